"""A fake engine behind the server: in-process, and behind a real socket of an ephemeral port."""

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from server.helpers import CONFIG, LiveServer, client_of, eventually, serving

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
    with serving(FakeEngine(), CONFIG) as live:
        yield live


@pytest.fixture
def server(running_server: LiveServer) -> Iterator[LiveServer]:
    """The running server, with a well-behaved script before and no live request after."""
    engine = running_server.engine
    engine.script = FakeScript()
    engine.aborted.clear()
    engine.finished.clear()
    yield running_server
    eventually(lambda: not engine.live)
