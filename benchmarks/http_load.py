"""A client that costs little: HTTP/1.1 on bare asyncio protocols, which counts frames.

For benchmarks of the server alone. It reads no JSON while a stream runs, so that on the machine
that it shares with the server it is not what is measured. Knows no benchmark.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

FRAME = b"data: {"
_TAIL = 2048  # bytes of a response that are kept: its last frames


@dataclass
class Answer:
    """What came back for one request."""

    start_s: float
    status: int = 0
    num_frames: int = 0
    first_s: float = 0.0  # when the first frame with text may have come: after the one with a role
    last_s: float = 0.0
    head: bytes = b""  # status line and headers, in lower case
    tail: bytes = b""
    frame_times: list[float] = field(default_factory=list)  # of reads that brought frames

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.start_s

    @property
    def took_s(self) -> float:
        """Seconds to the end."""
        return self.last_s - self.start_s

    @property
    def ended_well(self) -> bool:
        """Whether a stream came to its end, and not with an error."""
        return self.status == 200 and b"[DONE]" in self.tail and b'data: {"error"' not in self.tail

    @property
    def ended(self) -> bool:
        """Whether the client was told of an end: the answer's, a refusal or an error event."""
        return b"[DONE]" in self.tail if self.status == 200 else self.status >= 400


def http_request(path: str, body: Any, *, headers: str = "") -> bytes:
    """The bytes of a POST. `body` may be bytes already, and then nonsense."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n{headers}\r\n"
    )
    return head.encode() + payload


class Connection(asyncio.Protocol):
    """One keep-alive connection, which has one request at a time."""

    def __init__(self, *, num_silent_frames: int = 0, keep_times: bool = False):
        self._num_silent = num_silent_frames  # at the start of a stream: a chat's role
        self._keep_times = keep_times
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._left = -1  # bytes of a body of known length; -1: it comes in chunks
        self._head = b""
        self._carry = b""
        self.is_closed = False

    @classmethod
    async def open(cls, port: int, **options: Any) -> "Connection":
        """Connect to the server on this machine."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(**options), "127.0.0.1", port)
        return connection

    async def ask(self, request: bytes, *, timeout_s: float = 60.0) -> Answer:
        """Send a request and read all of its response; TimeoutError, or OSError where it broke."""
        self._done = asyncio.get_running_loop().create_future()
        self._answer = Answer(time.perf_counter())
        self._head, self._carry, self._left = b"", b"", -1
        self._transport.write(request)
        async with asyncio.timeout(timeout_s):
            await self._done
        return self._answer

    @property
    def answer(self) -> Answer | None:
        """What has come so far."""
        return self._answer

    def abort(self) -> None:
        """Go away without a word."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionResetError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or self._done is None or self._done.done():
            return
        if not answer.status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            answer.status, answer.head = int(head[9:12]), head.lower()
            for line in answer.head.split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    self._left = int(line.split(b":")[1])
        self._count(answer, data)
        if self._left >= 0:
            self._left -= len(data)
            is_over = self._left == 0
        else:
            is_over = answer.tail.endswith(b"\r\n0\r\n\r\n")
        if is_over:
            answer.last_s = time.perf_counter()
            self._done.set_result(None)

    def _count(self, answer: Answer, data: bytes) -> None:
        seen = self._carry + data
        num_new = seen.count(FRAME)
        self._carry = seen[-(len(FRAME) - 1) :]
        answer.tail = (answer.tail + data)[-_TAIL:]
        if num_new:
            answer.num_frames += num_new
            now_s = time.perf_counter()
            if not answer.first_s and answer.num_frames > self._num_silent:
                answer.first_s = now_s
            if self._keep_times:
                answer.frame_times.append(now_s)


class Client:
    """Connections to one server, each used again; as many as there are requests at a time."""

    def __init__(self, port: int):
        self.port = port
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, *, timeout_s: float = 60.0) -> Answer | None:
        """The answer, or None where none came: the connection broke, or the time was over."""
        connection = await self._take()
        try:
            answer = await connection.ask(request, timeout_s=timeout_s)
        except (OSError, TimeoutError):
            connection.abort()
            return None
        if b"connection: close" in answer.head:
            connection.abort()
        else:
            self._idle.append(connection)
        return answer

    async def leave(self, request: bytes, after_s: float) -> None:
        """Ask, and go away without a word after so many seconds."""
        connection = await self._take()
        try:
            with contextlib.suppress(OSError, TimeoutError):
                await connection.ask(request, timeout_s=after_s)
        finally:
            connection.abort()

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.abort()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                return connection
        return await Connection.open(self.port)


async def closed_loop(port: int, request: bytes, *, num: int, seconds: float) -> list[Answer]:
    """`num` clients who each ask again once they have their answer; those answered in time."""
    client = Client(port)
    end_s = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def one() -> None:
        while time.perf_counter() < end_s:
            answer = await client.ask(request)
            if answer is not None and answer.last_s <= end_s:
                answers.append(answer)

    await asyncio.gather(*[one() for _ in range(num)])
    client.close()
    return answers


async def open_loop(
    rate: float, seconds: float, start: Callable[[int], Coroutine[Any, Any, None]]
) -> None:
    """Begin `start(i)` at a steady rate, whatever becomes of those before; wait for all."""
    begin_s = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    for index in range(int(rate * seconds)):
        wait_s = begin_s + index / rate - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(start(index))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
