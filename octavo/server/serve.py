"""Runs an application under uvicorn: limits of the HTTP layer, signals, drain, death of the engine.

The first SIGTERM drains: not ready, no new work, accepted requests finish within the drain time;
who asks meanwhile is told so. The second one ends at once. A dead engine ends the server too, after
its streams have been told.
"""

import asyncio
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import EngineDeadError
from octavo.server.config import ServerConfig
from octavo.server.http_protocol import http_protocol
from octavo.server.limits import MAX_HEADER_BYTES
from octavo.server.loading import LoadingPage
from octavo.server.state import ServerState

logger = logging.getLogger(__name__)

_HEALTH_INTERVAL_S = 0.5
_LAST_WORDS_S = 5  # for connections to close once there is nothing left to wait for


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
        self._drain_timeout_s = config.drain_timeout_s
        self._page = LoadingPage(self._octavo.limits)
        super().__init__(
            uvicorn.Config(
                _Startup(app, self._page),
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
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, but while a model loads, probes are answered, and a signal ends the start."""
        starting = asyncio.create_task(self._start(sockets))
        await asyncio.wait([starting], timeout=0.1)
        if sockets and not starting.done():
            await self._page.open(sockets[0], self.config)
        while not starting.done() and not self.should_exit:
            await asyncio.wait([starting], timeout=0.1)
        self._page.close()
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
        """uvicorn's, with a watch over the engine beside it, and the drain at its end."""
        watch = asyncio.create_task(self._watch_engine())
        try:
            await super().main_loop()
            await self._drain()
        finally:
            watch.cancel()
            if self.engine_error is None:
                self._look_at_engine()  # what ended the last streams may have been its death

    async def _drain(self) -> None:
        """Let accepted requests finish, and go on to listen: new ones hear why, not nothing."""
        end_s = time.monotonic() + self._drain_timeout_s
        while self.server_state.tasks and not self.force_exit and self.engine_error is None:
            if time.monotonic() >= end_s:
                self.config.timeout_graceful_shutdown = 0
                return
            await asyncio.sleep(0.05)

    async def _watch_engine(self) -> None:
        while self.engine_error is None:
            try:
                self._look_at_engine()
            except Exception:  # of whatever kind: the next look may be the one that matters
                logger.exception("the watch over the engine stumbled")
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    def _look_at_engine(self) -> None:
        self._octavo.watchdog.look()
        try:
            self._octavo.engine.check_health()
        except EngineDeadError as error:
            logger.critical("the engine is dead, so the server ends: %s", error)
            self.engine_error = error
            self._octavo.draining = True
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or end at once where that was asked before. uvicorn would die of the signal."""
        if self.should_exit:
            self.force_exit = True
        self._octavo.draining = True
        self.should_exit = True
        logger.info("%s: draining", signal.Signals(sig).name)


class _Startup:
    """Closes the loading page before the server listens; shortens the log of a failed start.

    There is no traceback there, for `serve` raises the error itself.
    """

    def __init__(self, app: ASGIApp, page: LoadingPage):
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_traceback(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._page.close()
            elif message["type"] == "lifespan.startup.failed":
                message = {"type": "lifespan.startup.failed"}
            await send(message)

        is_lifespan = scope["type"] == "lifespan"
        await self._app(scope, receive, send_without_traceback if is_lifespan else send)
