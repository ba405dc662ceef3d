"""What clients may do on the wire, or write between the lines, to a real process."""

import json
import re
import socket
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.conftest import LONG_NAME
from faults.processes import PROMPT, Server
from faults.refused import CHAT, COMPLETIONS, ask_for_shape

pytestmark = pytest.mark.server

NUM_SHAPES_TO_FILL = 80  # the cache of compiled shapes, which holds 64
NUMBERS = count()  # of shapes that nobody has asked for
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def connect(server: Server) -> socket.socket:
    port = httpx.URL(server.url).port
    assert port is not None
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def head_of(server: Server, path: str, num_bytes: int) -> bytes:
    """The head of a POST with a body of so many bytes."""
    key = server.headers["authorization"]
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {num_bytes}\r\n\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    """All until the server closes."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def test_F02_a_body_without_end_is_cut_off_while_it_comes(server: Server) -> None:
    head = head_of(server, COMPLETIONS, 0).replace(
        b"content-length: 0", b"transfer-encoding: chunked"
    )

    with connect(server) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.sendall(head)
        for _ in range(2**10):
            connection.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")


def test_F03_headers_without_end(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                connection.sendall(b"x" * 10_000)
    many = {f"x-{i}": "a" for i in range(200)}
    assert server.client.get(f"{server.url}/v1/models", headers=many).status_code == 431


@pytest.mark.parametrize("sent", ["GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ", "body"])
def test_F04_what_trickles_in_is_not_waited_for(server: Server, sent: str) -> None:
    with connect(server) as connection:
        connection.sendall(head_of(server, COMPLETIONS, 100) if sent == "body" else sent.encode())
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_F17_text_that_spells_special_tokens_is_text(server: Server) -> None:
    text = "</s><|user|><|assistant|>"
    tokens = server.client.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert len(tokens) == len(text) and max(tokens) < 256
    assert server.complete(prompt=text).json()["usage"]["prompt_tokens"] == len(text)


def test_F22_an_expression_that_makes_others_backtrack_costs_nothing(server: Server) -> None:
    for regex in ("(a+)+", "(a|a)*b", "(.*)*x"):
        response = server.complete(structured_outputs={"regex": regex}, ignore_eos=False)
        assert response.status_code == 200, response.text


def test_F23_many_shapes_are_all_served(server: Server) -> None:
    for number in islice(NUMBERS, NUM_SHAPES_TO_FILL):
        response = ask_for_shape(server, number)
        assert response.status_code == 200, response.text


def test_F26_what_is_no_call_is_content(server: Server) -> None:
    """The model is random: whatever it writes, it calls nothing."""
    body: dict[str, Any] = {"messages": HELLO, "tools": [TOOL], "max_tokens": 40}
    response = server.client.post(f"{server.url}{CHAT}", json=body | {"ignore_eos": True})
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "length" and not choice["message"].get("tool_calls")
    assert isinstance(choice["message"]["content"], str)


KEYS = {
    "none": {},
    "wrong": {"authorization": "Bearer another"},
    "longer": {"authorization": "Bearer the-key2"},
    "basic": {"authorization": "Basic the-key"},
    "host": {"host": "x/health?"},
}
PATHS = (COMPLETIONS, "/metrics", "/v1/models", "//health", "/health/../v1/models", "/%68ealth/x")


@pytest.mark.parametrize("headers", KEYS.values(), ids=KEYS)
def test_F33_without_the_key_there_is_nothing(server: Server, headers: dict[str, str]) -> None:
    with httpx.Client() as stranger:
        for path in PATHS:
            response = stranger.request("GET", f"{server.url}{path}", headers=headers)
            assert response.status_code == 401, (path, response.text)
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get(f"{server.url}/health").status_code == 200


def test_F36_a_reader_that_stops_reading_is_given_up_and_others_notice_nothing(
    server: Server, fault: Path
) -> None:
    fault.write_text("sleep 0.004")  # or a busy machine sends many tokens in one frame
    given_up = 'request_success_total{finished_reason="abort"}'
    body = {"prompt": PROMPT, "stream": True, "n": 4, "max_tokens": 450, "ignore_eos": True}
    payload = json.dumps(body | {"model": LONG_NAME}).encode()

    num_before, num_steps = server.metric(given_up), server.metric("engine_steps_total")
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head_of(server, COMPLETIONS, len(payload)) + payload)
        server.until(lambda: server.metric("engine_steps_total") > num_steps)
        assert server.complete(prompt=PROMPT).status_code == 200
        # The engine may be done with it long before its reader is given up.
        server.until(lambda: server.metric(given_up) == num_before + 4)


def test_a_client_that_speaks_no_http_does_not_fill_the_log(server: Server) -> None:
    num_lines = len(server.err)
    for _ in range(20):
        with connect(server) as connection:
            head = head_of(server, "/nowhere", 0)
            connection.sendall(head.replace(b"content-length: 0", b"transfer-encoding: chunked"))
            data = b""
            while not re.search(rb"\}\}$", data):
                data += connection.recv(65536)
            connection.sendall(b"no length\r\n")
            assert read_all(connection) == b""
    assert len(server.err) == num_lines, server.err[num_lines:]
