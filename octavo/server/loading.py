"""What answers while the model loads, on the socket that the server will listen on.

Alive, not ready, and no work yet: so probes can tell a start that takes long from a server that is
gone. Reads no more than the head of a request, and says nothing that a key would be needed for.
"""

import asyncio
import contextlib
import socket

import uvicorn

from octavo.server.errors import unavailable
from octavo.server.limits import MAX_HEADER_BYTES, Limits

_ALIVE = (b"/health", b"/v2/health/live")
_RETRY_AFTER_S = 5.0


class LoadingPage:
    """A listener that every request is told by that the model loads. Opened and closed once."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._server: asyncio.Server | None = None

    async def open(self, listener: socket.socket, config: uvicorn.Config) -> None:
        """Begin to answer; `listener` stays the caller's, and open."""
        self._server = await asyncio.start_server(
            self._answer, sock=listener.dup(), limit=MAX_HEADER_BYTES, ssl=config.ssl
        )

    def close(self) -> None:
        """Take no more connections; those that come now wait for the server itself."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken = (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        with contextlib.suppress(*broken):
            async with asyncio.timeout(self._limits.read_timeout_s):
                head = await reader.readuntil(b"\r\n\r\n")
                words = head.split(b" ", 2)
                writer.write(_reply(words[1] if len(words) == 3 else b""))
                await writer.drain()
        writer.close()


def _reply(path: bytes) -> bytes:
    if path in _ALIVE:
        status, body, retry = "200 OK", b'{"status":"ok","state":"loading"}', ""
    else:
        reply = unavailable("the model loads", "loading", retry_after_s=_RETRY_AFTER_S)
        status, body = "503 Service Unavailable", reply.body(state="loading")
        retry = f"retry-after: {reply.headers['retry-after']}\r\n"
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{retry}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
