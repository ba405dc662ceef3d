"""An ASGI response that generates while it is sent, as one JSON document or as server-sent events.

Owns the order of things: nothing is sent before the engine has taken the request, so refusals keep
their status; after that a failure is an event in the stream. Knows no shape.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.engine import TextDelta
from octavo.server.allowance import Reservation
from octavo.server.answers import Answers
from octavo.server.errors import ClientDisconnected, log_failure, reply_to, unavailable
from octavo.server.response_shape import Piece, Shape

_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the stream otherwise
}

_SHUTTING_DOWN = unavailable("the server is shutting down", "draining")


class GenerationResponse(Response):
    """Runs the answers for as long as somebody reads them.

    `reserve` sets the tokens aside that they may need, and raises where a key has too few left.
    """

    def __init__(
        self,
        answers: Answers,
        shape: Shape,
        *,
        stream: bool,
        reserve: Callable[[], Reservation],
    ):
        super().__init__()
        self._answers = answers
        self._shape = shape
        self._stream = stream
        self._reserve = reserve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reservation = self._reserve()
        scope["octavo.model"] = self._shape.options.model  # for traces
        try:
            with ExitStack() as watching:
                for watch in scope.get("octavo.watchers", ()):
                    watching.enter_context(watch(scope, self._answers))
                await self._run(scope, receive, send)
        finally:
            reservation.settle(self._answers.num_used_tokens)
            scope["octavo.num_tokens"] = self._answers.num_tokens  # for the log

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answers.running(receive):
            try:
                await self._answers.first()
                response = None if self._stream else await self._json()
            except asyncio.CancelledError:  # the server's drain time is over
                response = _SHUTTING_DOWN.response()
            if response is None:
                await self._send_events(send, scope["octavo.request_id"])
            else:
                await response(scope, receive, send)

    async def _json(self) -> Response:
        tallies = self._answers.tallies
        deltas: Sequence[list[TextDelta]] = [[] for _ in tallies]
        async for batch in self._answers.batches():
            for index, delta in batch:
                deltas[index].append(delta)
        pieces = [Piece.joined(of_one) for of_one in deltas]
        document = self._shape.response(pieces, tallies)
        return Response(orjson.dumps(document), media_type="application/json")

    async def _send_events(self, send: Send, request_id: str) -> None:
        headers = [(name.encode(), value.encode()) for name, value in _EVENT_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _write(send, self._shape.opening())
            async for batch in self._answers.batches():
                await _write(send, self._shape.frames(batch))
            last = self._shape.closing(self._answers.tallies)
        except ClientDisconnected as error:
            log_failure(error, request_id)
            return
        except asyncio.CancelledError:  # the server's drain time is over; so is this task, anyway
            last = self._shape.failure(_SHUTTING_DOWN)
        except Exception as error:
            log_failure(error, request_id)
            last = self._shape.failure(reply_to(error))
        await _write(send, last, more=False)


async def _write(send: Send, frames: bytes, *, more: bool = True) -> None:
    if frames or not more:
        await send({"type": "http.response.body", "body": frames, "more_body": more})
