"""The OpenAPI document: every route with its scope, its body and its answers, from the route table.

Owns only what the code does not say elsewhere: an example for each body, and what each refusal
means. Fields, types and defaults come from the structs that read the bodies; what a field means
comes from the docstrings of the structs that it ends in. Knows no server: the document is the same
for all of them.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from octavo.core import PoolingParams, RequestOptions, SamplingParams
from octavo.server.keys import Scope
from octavo.server.protocol import ChatRequest, CompletionRequest, SamplingFields
from octavo.server.responses_protocol import ResponsesRequest
from octavo.server.routes_adapters import LoadAdapterRequest, UnloadAdapterRequest
from octavo.server.routes_embeddings import EmbeddingRequest
from octavo.server.routes_kserve import GenerateRequest as KServeRequest
from octavo.server.routes_kserve import InferRequest
from octavo.server.routes_scoring import RerankRequest, ScoreRequest
from octavo.server.routes_tgi import GenerateRequest as TGIRequest
from octavo.server.routes_tokenize import DetokenizeRequest, TokenizeRequest
from octavo.server.state import JSON, Route

Surfaces = Mapping[str, Sequence[Route]]  # by the name of the surface
Schema = dict[str, Any]

# Of the API: the version of the package wants a key for `/version`.
API_VERSION = "1"

EXAMPLES: dict[type[msgspec.Struct], Mapping[str, object]] = {
    CompletionRequest: {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    ChatRequest: {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    },
    ResponsesRequest: {"input": "What is the capital of France?", "temperature": 0},
    EmbeddingRequest: {"input": ["The capital of France is Paris", "Bonjour"]},
    ScoreRequest: {"text_1": "a large animal", "text_2": ["an elephant", "a mouse"]},
    RerankRequest: {"query": "a large animal", "documents": ["an elephant", "a mouse"]},
    TokenizeRequest: {"prompt": "The capital of France is"},
    DetokenizeRequest: {"tokens": [72, 101, 108, 108, 111]},
    TGIRequest: {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 16}},
    LoadAdapterRequest: {"lora_name": "sql", "lora_path": "sql"},
    UnloadAdapterRequest: {"lora_name": "sql"},
    KServeRequest: {"text_input": "The capital of France is", "parameters": {"max_tokens": 16}},
    InferRequest: {
        "inputs": [
            {
                "name": "text_input",
                "datatype": "BYTES",
                "shape": [1],
                "data": ["The capital of France is"],
            }
        ]
    },
}

_DESCRIPTION = """\
Where the server has keys, send one as `Authorization: Bearer KEY`; a route names the scope that the
key must have. Every response has an `x-request-id`: the client's own where it sent one. Every error
has one shape, and fields that are unknown are ignored."""

_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


class ErrorObject(msgspec.Struct):
    """What went wrong. `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every error."""

    error: ErrorObject


def document(surfaces: Surfaces) -> dict[str, Any]:
    """OpenAPI 3.1, of all routes that there are."""
    routes = [route for of_surface in surfaces.values() for route in of_surface]
    bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    references, components = msgspec.json.schema_components(
        [*bodies, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    for body, reference in zip(bodies, references, strict=False):
        _set_defaults(body, components[reference["$ref"].rpartition("/")[2]])
    for schema in components.values():
        _describe_fields(schema)
    body_schemas = dict(zip(bodies, references, strict=False))
    paths: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    handlers: list[object] = []
    for surface, of_surface in surfaces.items():
        for route in of_surface:
            operation = _operation(surface, route, references[-1])
            if route.handler in handlers:  # ids are unique: of its further paths they name the path
                operation["operationId"] += route.path.replace("/", ".")
            handlers.append(route.handler)
            if route.body is not None:
                operation["requestBody"] = _request_body(route.body, body_schemas[route.body])
            path = _PATH_PARAMETER.sub(r"{\1}", route.path)
            paths[path][route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": API_VERSION, "description": _DESCRIPTION},
        "tags": [{"name": surface} for surface in surfaces],
        "paths": dict(paths),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(surface: str, route: Route, error: Schema) -> dict[str, Any]:
    text = " ".join((inspect.getdoc(route.handler) or "").split())
    scope = "none" if route.scope is Scope.PUBLIC else str(route.scope)
    success: dict[str, Any] = {"description": "The answer."}
    if route.media:
        success["content"] = {media: {} for media in route.media}
    failure = {JSON: {"schema": error}}
    refusals = {
        status: {"description": description, "content": failure}
        for status, description in _refusals(route)
    }
    return {
        "tags": [surface],
        "operationId": route.handler.__qualname__,
        "summary": text.partition(". ")[0].rstrip("."),
        "description": f"{text} Scope of the key: {scope}.",
        "security": [] if route.scope is Scope.PUBLIC else [{"key": [scope]}],
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {"200": success} | refusals,
    }


def _path_parameters(route: Route) -> Iterator[Schema]:
    for name in _PATH_PARAMETER.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(route: Route) -> Iterator[Schema]:
    if route.query is None:
        return
    [schema] = msgspec.json.schema_components([route.query])[1].values()
    meanings = field_meanings(route.query)
    for name, field in schema["properties"].items():
        meaning = meanings.get(name, "")
        yield {"name": name, "in": "query", "description": meaning, "schema": field}


def _refusals(route: Route) -> Iterator[tuple[str, str]]:
    """What a client of the route must be ready for."""
    is_public, is_post = route.scope is Scope.PUBLIC, route.method == "POST"
    if route.body is not None:
        yield "400", "The body is wrong; `param` names the field."
    elif route.query is not None:
        yield "400", "The query is wrong; `param` names the field."
    if not is_public:
        yield "401", "No key, or one that the server does not know."
        yield "403", f"The key is not for {route.scope} routes, or is another tenant's."
    if route.body is not None or "{" in route.path:
        yield "404", "What the path or the body names does not exist here."
    if route.body is not None:
        yield "408", "The body did not arrive in time."
        yield "413", "The body is too large."
    if is_post and route.scope is Scope.INFERENCE:
        yield "429", "The key has used what it may; `Retry-After`, where present, says until when."
    if is_post and not is_public:
        yield "503", "The server is overloaded, sleeps, shuts down, or its engine is dead."
    yield "default", "Any other failure."


def _request_body(body: type[msgspec.Struct], schema: Schema) -> dict[str, Any]:
    content = {"schema": schema, "example": EXAMPLES[body]}
    return {"required": True, "content": {JSON: content}}


def _set_defaults(body: type[msgspec.Struct], schema: Schema) -> None:
    """Show what null stands for: such fields are left to `SamplingParams`."""
    if not issubclass(body, SamplingFields):
        return
    for name in SamplingFields.__struct_fields__:
        default = _SAMPLING["properties"].get(name, {}).get("default")
        # Each surface has a bound of new tokens of its own.
        if default is not None and name != "max_tokens":
            schema["properties"][name]["default"] = default


def _describe_fields(schema: Schema) -> None:
    """Say of each field that means something to the engine what it means there."""
    for name, field in schema["properties"].items():
        known = _KNOWN_FIELDS.get(name, {})
        if not _types(field):  # checked by hand, so the struct says nothing of its type
            field |= {key: value for key, value in known.items() if key != "default"}
        if name in _MEANINGS and _types(field) & _types(known):
            field["description"] = _MEANINGS[name]


def _types(field: Schema) -> set[str]:
    kinds = field.get("anyOf", [field])
    types = {one.get("type", "string" if "enum" in one else "null") for one in kinds}
    return types - {"null"}


def field_meanings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What a docstring says of each field, where it has the form `name, name: text`.

    A field without a text of its own points at the one that names it in backquotes.
    """
    names = "|".join(struct.__struct_fields__)
    start = rf"(?:^|(?<=\. ))((?:{names})(?:, (?:{names}))*): "
    parts = re.split(start, inspect.getdoc(struct) or "", flags=re.M)
    meanings: dict[str, str] = {}
    for listed, text in zip(parts[1::2], parts[2::2], strict=True):
        meanings |= dict.fromkeys(listed.split(", "), " ".join(text.split()))
    pointers: dict[str, str] = {}
    for name in set(struct.__struct_fields__) - meanings.keys():
        tellers = [teller for teller, text in meanings.items() if f"`{name}`" in text]
        pointers |= {name: f"see {tellers[0]}."} if tellers else {}
    return meanings | pointers


_ENGINES = (SamplingParams, PoolingParams, RequestOptions)
_MEANINGS = {name: text for one in _ENGINES for name, text in field_meanings(one).items()}
_COMPONENTS = msgspec.json.schema_components(_ENGINES, ref_template="#/components/schemas/{name}")[
    1
]
_SAMPLING = _COMPONENTS["SamplingParams"]
_KNOWN_FIELDS: dict[str, Schema] = {
    name: field
    for schema in _COMPONENTS.values()
    for name, field in schema.get("properties", {}).items()
}
