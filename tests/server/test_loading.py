"""While the model loads: probes are answered, work is refused, and nobody is kept waiting after."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import trustme
from server.helpers import CONFIG, eventually

from octavo.errors import ModelNotFoundError
from octavo.server import OctavoServer, ServerConfig, create_app
from octavo.testing.fake_engine import FakeEngine

Ask = Callable[[str, str], httpx.Response]


@contextmanager
def loading(
    config: ServerConfig, *, scheme: str = "http", verify: ssl.SSLContext | bool = True, fails=False
) -> Iterator[tuple[str, Ask, Callable[[], None]]]:
    """A server that loads until it is told that the model is there, or that it is none."""
    loaded = threading.Event()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        while not loaded.is_set():
            await asyncio.sleep(0.01)
        if fails:
            raise ModelNotFoundError("no such model")
        yield

    listener = socket.create_server(("127.0.0.1", 0))
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    server = OctavoServer(create_app(FakeEngine(), config, lifespan=lifespan), config)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:
            raised.append(error)

    def ask(method: str, path: str) -> httpx.Response:
        body = {"prompt": "Hi", "max_tokens": 2} if method == "POST" else None
        return httpx.request(method, url + path, json=body, timeout=10, verify=verify)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield url, ask, loaded.set
        if fails:
            thread.join(timeout=10)
        assert [type(error) for error in raised] == [ModelNotFoundError] * fails
    finally:
        server.should_exit = True
        loaded.set()
        thread.join(timeout=10)
        listener.close()
    assert not thread.is_alive()


def test_alive_but_not_ready_and_then_both() -> None:
    with loading(CONFIG) as (_, ask, done):
        for path in ("/health", "/v2/health/live"):
            assert ask("GET", path).json() == {"status": "ok", "state": "loading"}
        for method, path in [
            ("GET", "/ready"),
            ("GET", "/metrics"),
            ("POST", "/v1/completions"),
            ("GET", "/health/x"),
        ]:
            response = ask(method, path)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == response.json()["state"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        done()
        eventually(lambda: ask("GET", "/ready").status_code == 200)
        assert ask("POST", "/v1/completions").status_code == 200


def test_strange_clients_cost_nothing() -> None:
    with loading(CONFIG) as (url, ask, done):
        address = ("127.0.0.1", httpx.URL(url).port)
        for sent in (b"", b"garbage", b"\r\n\r\n", b"GET /ready", b"x" * 100_000):
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                try:
                    answer = client.recv(100)
                except ConnectionResetError:
                    answer = b""
                assert answer == b"" or answer.startswith(b"HTTP/1.1 503 ")
        with socket.create_connection(address, timeout=5) as silent:
            assert silent.recv(100) == b""  # closed when its time to send is over
        assert ask("GET", "/ready").status_code == 503
        done()
        eventually(lambda: ask("GET", "/ready").status_code == 200)


def test_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    pem = str(tmp_path / "pem")
    config = replace(CONFIG, ssl_certfile=pem, ssl_keyfile=pem)
    with loading(config, scheme="https", verify=context) as (_, ask, done):
        assert ask("GET", "/ready").status_code == 503
        done()
        eventually(lambda: ask("GET", "/ready").status_code == 200)


def test_a_model_that_does_not_load_ends_it() -> None:
    with loading(CONFIG, fails=True) as (_, ask, done):
        assert ask("GET", "/ready").status_code == 503
        done()
