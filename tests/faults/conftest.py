"""One tiny model for all, and one server for the faults that a server must survive."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from faults import plant
from faults.processes import Server, serving

from octavo.testing.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written there happens to the survivor's engine, see `plant`."""
    return tmp_path_factory.mktemp("planted") / "fault"


@pytest.fixture(scope="session")
def survivor(model: Path, fault: Path) -> Iterator[Server]:
    """A server with a watchdog that only tells; in short supply of everything."""
    flags = ["--watchdog-timeout-s", "4", "--watchdog-action", "log"]
    flags += ["--max-num-seqs", "4", "--max-num-queued-reqs", "4"]
    environment = plant.environment(fault.parent, fault)
    with serving(model, *flags, environment=environment) as server:
        yield server


def golden(server: Server) -> list[int]:
    """What the model says to the known prompt."""
    choice = server.complete(return_token_ids=True).json()["choices"][0]
    ids: list[int] = choice["token_ids"]
    return ids


@pytest.fixture
def server(survivor: Server, fault: Path) -> Iterator[Server]:
    """The survivor; after the test it must be what it was before."""
    survivor.until(survivor.is_at_rest)
    said = golden(survivor)
    assert len(said) == 8
    processes = [psutil.Process(survivor.process.pid), survivor.engine]
    before = [(p.pid, p.num_threads(), p.memory_info().rss) for p in processes]
    yield survivor
    fault.unlink(missing_ok=True)
    assert survivor.process.poll() is None
    survivor.until(survivor.is_at_rest)
    survivor.until(lambda: survivor.state == "ok")
    assert golden(survivor) == said
    survivor.until(survivor.is_at_rest)
    assert survivor.engine.pid == before[1][0]
    for process, (_, num_threads, rss) in zip(processes, before, strict=True):
        assert process.num_threads() <= num_threads + 2  # a pool of threads grows when first used
        assert process.memory_info().rss < 1.2 * rss
