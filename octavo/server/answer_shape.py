"""`response_format` and `structured_outputs`: two ways to say what shape an answer must have.

Knows the fields of OpenAI and vLLM; no grammars.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from octavo.core import StructuredOutputsParams
from octavo.server.errors import HttpError, bad_request
from octavo.server.limits import Limits


class JsonSchemaFormat(msgspec.Struct):
    """A JSON schema and its name.

    name, description: for people; they change nothing.
    strict: of no effect: an answer always satisfies the whole schema.
    """

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's `response_format`: type is text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


def answer_shape(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputsParams | None,
    limits: Limits,
) -> StructuredOutputsParams | None:
    """The shape that a request asks for; None where it asks for none.

    Raises:
        HttpError: it asks in both ways, in an unknown one, or for a schema that is nested too deep.
    """
    found = structured_outputs
    if response_format is not None and response_format.type != "text":
        if found is not None:
            message = "response_format and structured_outputs say the same: give one"
            raise bad_request(message, param="response_format")
        found = _of_format(response_format)
    if found is not None and limits.is_too_deep(found.json):
        message = f"a JSON schema may be nested {limits.max_json_depth} levels deep"
        raise bad_request(message, param="structured_outputs", code="grammar_too_complex")
    return found


def names_of_shape(response_format: ResponseFormat | None, *, forced: bool) -> dict[str, str]:
    """What a request calls the shape of its answer, see `errors.name_fields`.

    forced: it is the shape of a call, which the request's tools make.
    """
    if forced:
        return {"structured_outputs": "tools"}
    return {} if response_format is None else {"structured_outputs": "response_format"}


def _of_format(response_format: ResponseFormat) -> StructuredOutputsParams:
    match response_format.type, response_format.json_schema:
        case "json_object", None:
            return StructuredOutputsParams(json_object=True)
        case "json_schema", JsonSchemaFormat(schema=Mapping() as schema):
            return StructuredOutputsParams(json=schema)
        case "json_schema", _:
            raise _wrong("response_format of type json_schema must have json_schema.schema")
        case _:
            raise _wrong("response_format.type must be text, json_object or json_schema")


def _wrong(message: str) -> HttpError:
    return bad_request(message, param="response_format")
