"""/metrics of a mixture that counts: figures, windows, and an engine that does not answer."""

import asyncio

import httpx
import pytest
from server.helpers import client_of
from server.test_server_metrics import samples

from octavo.errors import EngineDeadError, OverloadedError
from octavo.server import experts
from octavo.server.experts import imbalance
from octavo.testing.fake_engine import FakeEngine


class CountingEngine(FakeEngine):
    """Counts, as one started with --count-expert-tokens; says how often it was asked."""

    num_questions = 0
    failure: Exception | None = None
    hangs = False

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        return [*super().settings, ("count_expert_tokens", "True", "flag", "")]

    async def expert_tokens(self) -> dict[str, list[int]]:
        self.num_questions += 1
        if self.failure is not None:
            raise self.failure
        if self.hangs:
            await asyncio.Event().wait()
        return self.num_expert_tokens


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
async def client(engine: CountingEngine):
    async with client_of(engine) as client:
        yield client


@pytest.fixture
def _at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "LEAST_INTERVAL_S", 0.0)


every_scrape_asks = pytest.mark.usefixtures("_at_any_time")


async def ratios(client: httpx.AsyncClient) -> dict[str, float]:
    found = await samples(client)
    return {key[1]: v for key, v in found.items() if key[0] == "expert_load_imbalance_ratio"}


async def tokens(client: httpx.AsyncClient) -> dict[str, float]:
    return {k[1]: v for k, v in (await samples(client)).items() if k[0] == "expert_tokens_total"}


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5], 1.0), ([6, 0, 2, 0], 3.0), ([9, 0, 0], 3.0), ([0, 0], 0.0)]
)
def test_imbalance_is_the_largest_over_the_mean(counts: list[int], expected: float) -> None:
    assert imbalance(counts) == expected


async def test_tokens_are_summed_over_layers_and_each_layer_has_its_imbalance(client, engine):
    engine.num_expert_tokens = {"blocks.0.mlp": [900, 100, 200], "blocks.2.mlp": [400, 400, 400]}
    assert await tokens(client) == {"0": 1300, "1": 500, "2": 600}
    assert await ratios(client) == {"blocks.0.mlp": 2.25, "blocks.2.mlp": 1.0}


async def test_who_counts_nothing_is_not_asked(engine):
    silent = FakeEngine(num_expert_tokens={"blocks.0.mlp": [900, 100]})
    async with client_of(silent) as client:
        found = await samples(client)
        assert not [key for key in found if key[0].startswith("expert_")]


async def test_many_scrapes_ask_once(client, engine):
    engine.num_expert_tokens = {"blocks.0.mlp": [900, 100]}
    for _ in range(5):
        assert await tokens(client) == {"0": 900, "1": 100}
    assert engine.num_questions == 1


@every_scrape_asks
async def test_the_figure_is_of_recent_tokens_and_waits_until_they_are_enough(client, engine):
    engine.num_expert_tokens = {"blocks.0.mlp": [60, 0]}
    assert await ratios(client) == {}
    engine.num_expert_tokens = {"blocks.0.mlp": [300, 100]}
    assert await ratios(client) == {"blocks.0.mlp": 1.5}
    engine.num_expert_tokens = {"blocks.0.mlp": [301, 150]}  # too few since
    assert await ratios(client) == {"blocks.0.mlp": 1.5}
    engine.num_expert_tokens = {"blocks.0.mlp": [400, 200]}  # as many of each as before
    assert await ratios(client) == {"blocks.0.mlp": 1.0}


@every_scrape_asks
async def test_an_engine_that_slept_counts_from_0(client, engine):
    engine.num_expert_tokens = {"blocks.0.mlp": [900, 100]}
    await samples(client)
    engine.num_expert_tokens = {}  # asleep
    assert await tokens(client) == {"0": 900, "1": 100}
    engine.num_expert_tokens = {"blocks.0.mlp": [10, 150]}
    assert await tokens(client) == {"0": 10, "1": 150}
    assert await ratios(client) == {"blocks.0.mlp": 1.8}  # 160 tokens are too few
    engine.num_expert_tokens = {"blocks.0.mlp": [50, 150]}
    assert await ratios(client) == {"blocks.0.mlp": 1.5}


@every_scrape_asks
@pytest.mark.parametrize("failure", [EngineDeadError("gone"), OverloadedError("in a step"), None])
async def test_an_engine_that_does_not_answer_costs_nobody_the_scrape(
    client, engine, monkeypatch, failure
):
    engine.num_expert_tokens = {"blocks.0.mlp": [900, 100]}
    await samples(client)
    monkeypatch.setattr(experts, "PATIENCE_S", 0.01)
    engine.num_expert_tokens, engine.failure, engine.hangs = {}, failure, failure is None
    assert await tokens(client) == {"0": 900, "1": 100}
    assert engine.num_questions == 2
