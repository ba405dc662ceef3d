"""Clients of an application on a fake engine, and patience with other threads."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from octavo.server import OctavoServer, ServerConfig, create_app
from octavo.testing.fake_engine import FakeEngine

CONFIG = ServerConfig(max_request_bytes=200_000, read_timeout_s=0.3, write_timeout_s=0.3)


def eventually(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
    """Wait for another thread to make something true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def client_of(engine: FakeEngine, config: ServerConfig = CONFIG) -> httpx.AsyncClient:
    """An in-process client of a fresh application."""
    transport = httpx.ASGITransport(create_app(engine, config), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://octavo")


@dataclass
class LiveServer:
    """A server in a thread; the engine's books may be read from here."""

    engine: FakeEngine
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)


@contextmanager
def serving(engine: FakeEngine, config: ServerConfig) -> Iterator[LiveServer]:
    """A server in a thread, on a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = OctavoServer(create_app(engine, config), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    eventually(lambda: server.started)
    try:
        yield LiveServer(engine, port)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
    assert not thread.is_alive()
