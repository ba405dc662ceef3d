"""uvicorn's HTTP/1.1 connection, with the two timers it lacks. Knows no requests.

Headers that trickle in (slow loris) end the connection, and so does a client that stops reading:
its generation is aborted as if it had hung up. Header sizes are bounded by h11 itself. What is no
HTTP ends the connection too, and is nothing that the log of an operator should fill with.
"""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.server.limits import Limits

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class _ClientsFaults(logging.LoggerAdapter[logging.Logger]):
    """A connection's log, where all that uvicorn warns of are clients' mistakes: for debugging."""

    @property
    def level(self) -> int:
        """Of the log itself: uvicorn asks."""
        return self.logger.level

    def warning(self, msg: object, *args: object, **options: Any) -> None:
        self.debug(msg, *args, **options)


class TimedHttpProtocol(H11Protocol):
    """One connection. The timers cost nothing while a request streams."""

    limits: Limits
    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.logger = _ClientsFaults(self.logger, {})  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaits_headers():
            self._expect_headers()
        else:
            self._stop_read_timer()

    def send_400_response(self, msg: str) -> None:
        """Tell who speaks no HTTP, unless the answer has been given already, and hang up.

        A request that was under way has lost its client: what is still answered goes nowhere.
        """
        if not self._awaits_headers():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        timeout_s = self.limits.write_timeout_s
        self._write_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _awaits_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        if self._read_timer is None:
            timeout_s = self.limits.read_timeout_s
            self._read_timer = self.loop.call_later(timeout_s, self._headers_late)

    def _headers_late(self) -> None:
        self._read_timer = None
        if self._awaits_headers() and not self.transport.is_closing():
            self.transport.write(_TOO_SLOW)
            self.transport.close()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def http_protocol(limits: Limits) -> type[TimedHttpProtocol]:
    """The connection class of a server with these limits."""

    class LimitedHttpProtocol(TimedHttpProtocol):
        pass

    LimitedHttpProtocol.limits = limits
    return LimitedHttpProtocol
