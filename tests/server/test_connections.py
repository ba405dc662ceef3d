"""What happens on the wire: clients that vanish, stall, trickle or flood. Raw sockets."""

import json
import logging
import re
import socket
import time
from typing import Any

import httpx
import pytest
from server.helpers import LiveServer, eventually

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: octavo\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    ).encode() + payload


def read_all(connection: socket.socket) -> bytes:
    """All until the server closes."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def read_until(connection: socket.socket, pattern: bytes) -> bytes:
    data = b""
    while pattern not in data:
        chunk = connection.recv(65536)
        assert chunk, data
        data += chunk
    return data


def aborted_answers(server: LiveServer) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'request_success_total\{finished_reason="abort"\} ([0-9.]+)', text)
    assert found
    return float(found[1])


LONG = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True}
REQUESTS = {
    "one answer": (COMPLETIONS, LONG, 1),
    "n answers": (COMPLETIONS, LONG | {"n": 3}, 3),
    "several prompts": (COMPLETIONS, LONG | {"prompt": ["a", "b"], "n": 2}, 4),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}, 1),
}


@pytest.mark.parametrize(("path", "body", "num_answers"), REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "decoding"])
def test_f35_disconnect_frees(
    server: LiveServer, path: str, body: dict[str, Any], num_answers: int, stream: bool, state: str
) -> None:
    script = server.engine.script
    script.queue_delay_s = 60.0 if state == "queued" else 0.0
    script.token_delay_s = 0.002
    before = aborted_answers(server)
    num_requests = num_answers // body.get("n", 1)
    with server.connect() as connection:
        connection.sendall(request_bytes(path, body | {"stream": stream}))
        eventually(lambda: len(server.engine.live) == num_requests)
        if state == "decoding" and stream:
            read_until(connection, b"data: ")
        elif state == "decoding":
            tokens = server.engine.num_generation_tokens
            eventually(lambda: server.engine.num_generation_tokens > tokens + 3)
    closed = time.monotonic()
    eventually(lambda: not server.engine.live)
    assert time.monotonic() - closed < 0.5
    assert len(server.engine.aborted) == num_requests
    assert not server.engine.finished
    assert aborted_answers(server) == before + num_answers


def test_f35_disconnect_within_the_body(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(COMPLETIONS, LONG)[:-10])
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert not server.engine.live


def test_finished_answers_are_no_aborts(server: LiveServer) -> None:
    before = aborted_answers(server)
    for stream in (False, True):
        body = {"prompt": "Hi", "stream": stream}
        assert httpx.post(f"{server.url}{COMPLETIONS}", json=body).status_code == 200
    assert len(server.engine.finished) == 2
    assert aborted_answers(server) == before


def test_connections_are_kept_alive(server: LiveServer) -> None:
    with server.connect() as connection:
        for stream in (True, False, True):
            connection.sendall(request_bytes(COMPLETIONS, {"prompt": "Hi", "stream": stream}))
            answer = read_until(connection, b"0\r\n\r\n" if stream else b"}}")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_f02_endless_chunked_body(server: LiveServer) -> None:
    with server.connect() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        num_sent = 0
        try:
            while num_sent < 10_000_000:  # the cap is 200,000
                connection.sendall(chunk)
                num_sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            return  # refused and closed while we were still sending
    pytest.fail("the server took ten million bytes")


def test_f02_content_length_is_believed(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n"
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


def test_f03_giant_header(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                connection.sendall(b"x" * 10_000)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_f04_slow_headers(server: LiveServer) -> None:
    start = time.monotonic()
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ")
        for _ in range(3):
            time.sleep(0.08)
            connection.sendall(b"x")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 2


def test_f04_slow_second_request(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(connection, b"}")
        time.sleep(0.4)  # an idle connection may rest longer than headers may take
        connection.sendall(b"GET /hea")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_f04_slow_body(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(COMPLETIONS, LONG)[:-10])
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_slow_handling_is_no_slow_client(server: LiveServer) -> None:
    server.engine.script.queue_delay_s = 0.6  # twice the read timeout
    response = httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": "Hi"})
    assert response.status_code == 200


def test_f36_reader_that_stalls(server: LiveServer) -> None:
    body = LONG | {"n": 64, "stream": True}
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_bytes(COMPLETIONS, body))
        eventually(lambda: len(server.engine.live) == 1)
        eventually(lambda: not server.engine.live, timeout_s=8)
    assert len(server.engine.aborted) == 1


def test_slow_reader_gets_everything(server: LiveServer) -> None:
    """A reader slower than the engine, but alive: fewer and larger writes, the same text."""
    server.engine.script.reply = lambda prompt, index: "0123456789" * 300
    body = {"prompt": "Hi", "max_tokens": 3000, "n": 4, "stream": True}
    with server.connect() as connection:
        connection.sendall(request_bytes(COMPLETIONS, body))
        data = b""
        while b"[DONE]" not in data:
            data += connection.recv(16384)
            time.sleep(0.001)
    texts = [""] * 4
    for frame in re.findall(rb"^data: (\{.*\})", data, re.MULTILINE):
        for choice in json.loads(frame)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["0123456789" * 300] * 4


def test_garbage(server: LiveServer) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(garbage + b"\r\n\r\n")
            assert read_all(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 408")
    assert httpx.get(f"{server.url}/health").status_code == 200


def lines_of_a_server(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """All but the client's, and those of a log of accesses, which `octavo serve` has not."""
    return [r for r in caplog.records if not r.name.startswith(("httpx", "uvicorn.access"))]


CHUNKED = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nowhere"])
def test_broken_chunks_end_the_connection_and_leave_the_log_alone(
    server: LiveServer, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Before an answer was begun there is a 400; after it, which needs no body, only the end."""
    with caplog.at_level(logging.INFO):
        for _ in range(20):
            with server.connect() as connection:
                connection.sendall(CHUNKED % path)
                answered = path == b"/nowhere"
                if answered:
                    read_until(connection, b'"code":null}}')
                connection.sendall(b"no length\r\n")
                told = read_all(connection)
            assert told[:12] == (b"" if answered else b"HTTP/1.1 400")
        assert httpx.get(f"{server.url}/health").status_code == 200
    lines = lines_of_a_server(caplog)
    assert [r for r in lines if r.exc_info or r.levelno >= logging.WARNING] == []
    assert len(lines) <= 20  # one for a connection: that its client is gone


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nowhere", b"/v1/models"])
@pytest.mark.parametrize("expects", [b"", b"expect: 100-continue\r\n"], ids=["", "continue"])
def test_broken_chunks_that_come_with_the_head_are_answered_once(
    server: LiveServer, path: bytes, expects: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection has said 400 before the application begins: what that says goes nowhere."""
    head = (CHUNKED % path).replace(b"host: x\r\n", b"host: x\r\n" + expects)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head + b"no length\r\n")
                told = read_all(connection)
            assert told.startswith(b"HTTP/1.1 400") and told.count(b"HTTP/1.1") == 1
        assert httpx.get(f"{server.url}/health").status_code == 200
    lines = lines_of_a_server(caplog)
    assert [r for r in lines if r.exc_info or r.levelno >= logging.WARNING] == []


def test_requests_for_websockets_leave_the_log_alone(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    with caplog.at_level(logging.INFO):
        assert httpx.get(f"{server.url}/health", headers=upgrade).status_code == 200
    assert lines_of_a_server(caplog) == []


@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/responses", b"/v2/models/m/generate"])
def test_f37_a_full_queue_refuses_before_the_body_is_there(server: LiveServer, path: bytes) -> None:
    server.engine.script.max_requests = 0
    with server.connect() as connection:
        head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % path
        connection.sendall(head + b"content-length: 100000\r\n\r\n")
        answer = read_until(connection, b"}}")
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 2" in answer
        connection.sendall(b" " * 100_000)  # the connection can be used again
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP/1.1 200 " in read_until(connection, b'"ok"')
    body = {"prompt": "Hi"}  # needs no place
    assert httpx.post(f"{server.url}/tokenize", json=body).status_code == 200
