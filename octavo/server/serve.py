"""Runs an application under uvicorn: limits of the HTTP layer, signals, drain, death of the engine.

The first SIGTERM drains: not ready, no new work, accepted requests finish within the drain time.
The second one ends at once. A dead engine ends the server too, after its streams have been told.
"""

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import EngineDeadError
from octavo.server.config import ServerConfig
from octavo.server.http_protocol import http_protocol
from octavo.server.limits import MAX_HEADER_BYTES
from octavo.server.state import ServerState

logger = logging.getLogger(__name__)

_HEALTH_INTERVAL_S = 1.0


def serve(
    app: FastAPI, config: ServerConfig, *, sockets: list[socket.socket] | None = None
) -> None:
    """Serve until a signal. `sockets` are bound already; without them, `config` says where.

    Raises:
        EngineDeadError: the engine died; the caller exits with a non-zero status.
        Exception: whatever the application's lifespan raised instead of starting.
    """
    server = OctavoServer(app, config)
    server.run(sockets=sockets)
    if server.engine_error is not None:
        raise server.engine_error


class OctavoServer(uvicorn.Server):
    """uvicorn's server with our drain and our watch over the engine."""

    def __init__(self, app: FastAPI, config: ServerConfig):
        self._octavo: ServerState = app.state.octavo
        self.engine_error: EngineDeadError | None = None
        super().__init__(
            uvicorn.Config(
                _ShortStartupFailure(app),
                host=config.host,
                port=config.port,
                http=http_protocol(self._octavo.limits),  # on h11: httptools bounds no headers
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                proxy_headers=False,
                timeout_keep_alive=config.keep_alive_s,
                timeout_graceful_shutdown=config.drain_timeout_s,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, but a signal ends a start that takes long: a model may be loading."""
        starting = asyncio.create_task(self._start(sockets))
        while not starting.done() and not self.should_exit:
            await asyncio.wait([starting], timeout=0.1)
        if not starting.done():
            starting.cancel()  # the lifespan is cancelled with the loop
        elif (failure := starting.result()) is not None:
            raise failure

    async def _start(self, sockets: list[socket.socket] | None) -> BaseException | None:
        """Start; returns why it failed. uvicorn knows nothing better than to exit."""
        try:
            await super().startup(sockets)
        except SystemExit as error:
            return self._octavo.startup_error or error
        return None

    async def main_loop(self) -> None:
        """uvicorn's, with a watch over the engine beside it."""
        watch = asyncio.create_task(self._watch_engine())
        try:
            await super().main_loop()
        finally:
            watch.cancel()

    async def _watch_engine(self) -> None:
        while True:
            try:
                self._octavo.engine.check_health()
            except EngineDeadError as error:
                logger.critical("the engine is dead, so the server ends: %s", error)
                self.engine_error = error
                self._octavo.draining = True
                self.should_exit = True
                return
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or end at once where that was asked before. uvicorn would die of the signal."""
        if self.should_exit:
            self.force_exit = True
        self._octavo.draining = True
        self.should_exit = True
        logger.info("%s: draining", signal.Signals(sig).name)


class _ShortStartupFailure:
    """Keeps the traceback of a failed start out of the log: `serve` raises the error itself."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_traceback(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                message = {"type": "lifespan.startup.failed"}
            await send(message)

        is_lifespan = scope["type"] == "lifespan"
        await self._app(scope, receive, send_without_traceback if is_lifespan else send)
