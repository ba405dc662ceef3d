"""A fake engine behind the server: in-process, and behind a real socket of an ephemeral port."""

import socket
import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from server.helpers import CONFIG, LiveServer, client_of, eventually

from octavo.server import OctavoServer, create_app
from octavo.testing.fake_engine import FakeEngine, FakeScript


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        yield client
    assert not engine.live  # whatever a test did, nothing leaks


@pytest.fixture(scope="session")
def running_server() -> Iterator[LiveServer]:
    engine = FakeEngine()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = OctavoServer(create_app(engine, CONFIG), CONFIG)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    eventually(lambda: server.started)
    yield LiveServer(engine, port)
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def server(running_server: LiveServer) -> Iterator[LiveServer]:
    """The running server, with a well-behaved script before and no live request after."""
    engine = running_server.engine
    engine.script = FakeScript()
    engine.aborted.clear()
    engine.finished.clear()
    yield running_server
    eventually(lambda: not engine.live)
