"""The arithmetic and the client of benchmarks/: slopes, percentiles, responses in any pieces."""

import asyncio
import sys
from pathlib import Path

import pytest

import octavo

sys.path.insert(0, str(Path(octavo.__file__).parents[1] / "benchmarks"))
try:
    from http_load import Answer, Client, http_request, percentile
    from soak import slope_per_hour
finally:
    sys.path.pop(0)

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'14\r\ndata: {"text":"a"}\n\n\r\n15\r\ndata: {"text":"bc"}\n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)
REFUSAL = (
    b'HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 12\r\n\r\n{"error":{}}'
)


def test_a_slope_is_that_of_the_line_through_the_samples() -> None:
    times_s = [0.0, 10.0, 20.0, 30.0]
    assert slope_per_hour(times_s, [5.0] * 4) == 0
    assert slope_per_hour(times_s, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(360)
    assert slope_per_hour(times_s, [1.0, 3.0, 1.0, 3.0]) == pytest.approx(0.04 * 3600)


def test_percentiles() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (51, 100)
    assert percentile([7.0], 0.99) == 7


async def asked(response: bytes, size: int) -> list[Answer | None]:
    """Two answers over one connection to a server that sends so many bytes at a time."""
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        while await reader.read(1000):
            for start in range(0, len(response), size):
                writer.write(response[start : start + size])
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = Client(server.sockets[0].getsockname()[1])
        answers = [await client.ask(http_request("/", {}), timeout_s=10) for _ in range(2)]
        client.close()
        await gone.wait()
    assert num_connections == 1
    return answers


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_the_client_reads_responses_in_any_pieces(size: int) -> None:
    for answer in await asked(STREAM, size):
        assert answer is not None and answer.status == 200
        assert answer.num_frames == 2 and answer.ended_well and answer.ended
        assert answer.start_s <= answer.first_s <= answer.last_s
    for answer in await asked(REFUSAL, size):
        assert answer is not None and answer.status == 503
        assert answer.ended and not answer.ended_well and b"retry-after: 1" in answer.head


async def test_a_stream_that_fails_has_ended_and_not_well() -> None:
    failing = STREAM.replace(b'data: {"text":"bc"}', b'data: {"error":"b"}')
    [answer, _] = await asked(failing, 1000)
    assert answer is not None and answer.ended and not answer.ended_well
