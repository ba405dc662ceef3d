"""From bytes on a socket to a checked structure: reads bodies and decodes JSON, strictly.

Owns the size cap, the time limit and the precise naming of a wrong field. Knows no route's fields.
"""

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import Request

from octavo.server.errors import ClientDisconnected, ErrorReply, HttpError, bad_request
from octavo.server.limits import Limits

T = TypeVar("T")

_TRAILING_INDEXES = re.compile(r"(\[[0-9.]*\])+$")
_MISSING = "Object missing required field `"


async def read_json(request: Request, limits: Limits) -> bytes:
    """The whole body of a request that says it is JSON, or says nothing."""
    content_type = request.headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise bad_request("the content type must be application/json", code="invalid_json")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > limits.max_request_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.read_timeout_s):
            return await _read(request, limits)
    except TimeoutError:
        message = f"the body did not arrive within {limits.read_timeout_s:g} s"
        raise _closing(408, message, "request_timeout") from None


async def _read(request: Request, limits: Limits) -> bytes:
    chunks = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk: bytes = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > limits.max_request_bytes:
            raise _too_large(limits)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(limits: Limits) -> HttpError:
    message = f"the body is larger than {limits.max_request_bytes} bytes"
    return _closing(413, message, "request_too_large")


def _closing(status: int, message: str, code: str) -> HttpError:
    """The rest of the body is not read, so the connection cannot be used again."""
    headers = {"connection": "close"}
    reply = ErrorReply(status, message, "invalid_request_error", None, code, headers)
    return HttpError(reply)


def decode(body: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """A body as the decoder's type; errors name the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from None
    except RecursionError:
        raise bad_request("the body is nested too deep", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise bad_request("the body is not valid JSON", code="invalid_json") from None


def decode_query(request: Request, kind: type[T]) -> T:
    """The query string as this type, whose fields are numbers and words; errors name the field."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error), "the query") from None


def _wrong_field(text: str, whole: str = "the body") -> HttpError:
    """Turn msgspec's "Expected `int`, got `str` - at `$.prompt[3]`" into OpenAI's error object."""
    problem, _, path = text.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    if problem.startswith(_MISSING):
        name = problem.removeprefix(_MISSING).rstrip("`")
        path = f"{path}.{name}" if path else name
        return bad_request(f"{path} is required", param=path)
    problem = problem[:1].lower() + problem[1:].replace("`", "")
    if not path:
        return bad_request(f"{whole}: {problem}")
    return bad_request(f"{path}: {problem}", param=_TRAILING_INDEXES.sub("", path))
