"""OpenAI's batch files: each line a request, answered by the application as if it came over HTTP.

So a batch passes the same checks and limits as everybody else. Knows no engine and no sockets.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from octavo.errors import OctavoError

logger = logging.getLogger(__name__)

URLS = frozenset({"/v1/completions", "/v1/chat/completions"})


class BatchRequest(msgspec.Struct, kw_only=True):
    """A line of the input."""

    custom_id: str
    method: str = "POST"
    url: str
    body: dict[str, Any]


_REQUEST = msgspec.json.Decoder(BatchRequest)


async def answers_to(
    app: ASGIApp, lines: Iterable[str], *, done: frozenset[str], concurrency: int
) -> AsyncIterator[dict[str, Any]]:
    """An output line for each input line, as they come, `concurrency` at a time.

    Lines whose `custom_id` is in `done` are passed over. A line that is no request gets an answer,
    too, with an error. `lines` are read as they are needed.
    """
    pending: set[asyncio.Task[dict[str, Any]]] = set()
    seen = set(done)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _read(line, number)
        if isinstance(request, dict):
            yield request
            continue
        if request.custom_id in seen:
            if request.custom_id not in done:
                message = f"line {number}: the custom_id was used before"
                yield _failed(request.custom_id, "duplicate_custom_id", message)
            continue
        seen.add(request.custom_id)
        pending.add(asyncio.create_task(_answer(app, request)))
        while len(pending) >= concurrency:
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                yield task.result()
    for answer in asyncio.as_completed(pending):
        yield await answer


def _read(line: str, number: int) -> BatchRequest | dict[str, Any]:
    """The request of a line, or the answer that it gets because it is none."""
    try:
        request = _REQUEST.decode(line)
    except msgspec.MsgspecError as error:
        return _failed(None, "invalid_line", f"line {number}: {error}")
    if request.method != "POST" or request.url not in URLS:
        message = f"line {number}: only POST to {' and '.join(sorted(URLS))} can be batched"
        return _failed(request.custom_id, "invalid_url", message)
    if request.body.get("stream"):
        message = f"line {number}: a batch cannot stream"
        return _failed(request.custom_id, "stream_in_batch", message)
    return request


def _failed(custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    return _line(custom_id, None, {"code": code, "message": message})


def _line(
    custom_id: str | None, response: dict[str, Any] | None, error: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


async def _answer(app: ASGIApp, request: BatchRequest) -> dict[str, Any]:
    status, headers, body = await _post(app, request.url, msgspec.json.encode(request.body))
    response = {
        "status_code": status,
        "request_id": headers.get("x-request-id"),
        "body": json.loads(body),
    }
    return _line(request.custom_id, response, None)


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request to an ASGI application: status, headers, body."""
    sent, status, headers, chunks = False, 0, {}, []

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # the client stays until it has its answer
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            chunks.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"batch")],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    if not status:
        raise OctavoError("the application ended without an answer")
    return status, headers, b"".join(chunks)
