"""Responses that run on without a reader.

Each is an ASGI response like any other, sent to nobody: so bounds, books and failures are those of
the others, and to cancel one is what it is for them, a client that goes away. Knows no engine.
"""

import asyncio

from starlette.responses import Response
from starlette.types import Message, Scope

from octavo.server.errors import log_failure, reply_to
from octavo.server.responses_shape import ResponsesShape


class Background:
    """All that run now. Sole writer of its table."""

    def __init__(self) -> None:
        self._running: dict[str, _Run] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, response: Response, shape: ResponsesShape, scope: Scope) -> None:
        """Run a response to its end; what becomes of it is for `shape` to tell."""
        run = _Run(response, shape, dict(scope))
        self._running[shape.id] = run
        run.task.add_done_callback(lambda _: self._running.pop(shape.id))

    async def cancel(self, response_id: str) -> None:
        """End a response, if it runs, and wait until it has."""
        run = self._running.get(response_id)
        if run is not None:
            run.cancelled.set()
            await asyncio.wait([run.task])

    async def close(self) -> None:
        """End them all: the server does."""
        for response_id in list(self._running):
            await self.cancel(response_id)


class _Run:
    """One response, and who pretends to read it."""

    def __init__(self, response: Response, shape: ResponsesShape, scope: Scope):
        self.cancelled = asyncio.Event()
        self._response = response
        self._shape = shape
        self._scope = scope
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._response(self._scope, self._receive, self._send)
        except Exception as error:
            if not self.cancelled.is_set():
                log_failure(error, self._scope["octavo.request_id"])
                self._shape.failure(reply_to(error))
        finally:
            if self.cancelled.is_set():
                self._shape.cancel()

    async def _receive(self) -> Message:
        await self.cancelled.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """The frames say nothing that the shape has not noted."""
