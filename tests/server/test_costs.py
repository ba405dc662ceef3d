"""Costs: who pays for what, that all of it adds up, and price files that say nothing useful."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.helpers import CONFIG, client_of

from octavo.errors import ConfigError
from octavo.server import ServerConfig, create_app
from octavo.server.answers import Tally
from octavo.server.costs import DECODE, IDLE, PREFILL, CostBook, Prices
from octavo.server.keys import new_key
from octavo.testing.fake_engine import FakeEngine


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def answered(prefill_s: float, decode_s: float, num_tokens: int) -> Any:
    """What the books read of a request with one answer."""
    tally = Tally(
        num_prompt_tokens=10,
        num_tokens=num_tokens,
        first_token_s=50.0,
        last_token_s=50.0 + decode_s,
        prefill_time_s=prefill_s,
    )
    return SimpleNamespace(tallies=[tally], num_tokens=(10, num_tokens))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> CostBook:
    """Of a machine that costs a dollar a second, and half of it at rest."""
    return CostBook(Prices(usd_per_joule=0.01, busy_watts=100, idle_watts=50), clock)


def test_time_with_requests_is_theirs_and_the_rest_is_nobodys(book: CostBook, clock: Clock) -> None:
    clock.now_s += 10
    one = book.enter(answered(1.0, 3.0, 20), "a")
    two = book.enter(answered(2.0, 2.0, 20), "b")
    clock.now_s += 4
    book.leave(one)
    book.leave(two)
    clock.now_s += 2
    book.settle()
    expected = {("", IDLE): 6.0, ("a", PREFILL): 0.5, ("a", DECODE): 1.5, ("b", PREFILL): 1.0}
    assert book.usd == pytest.approx(expected | {("b", DECODE): 1.0})
    assert sum(book.usd.values()) == pytest.approx(12 * 0.5 + 4)


def test_who_is_not_done_pays_for_what_was_and_nothing_is_counted_twice(
    book: CostBook, clock: Clock
) -> None:
    answers = answered(1.0, 0.0, 1)
    guest = book.enter(answers, "a")
    clock.now_s += 1
    book.settle()
    assert book.usd == pytest.approx({("", IDLE): 0, ("a", PREFILL): 1, ("a", DECODE): 0})
    answers.tallies[0].last_token_s += 5
    answers.num_tokens = (10, 6)
    clock.now_s += 5
    book.leave(guest)
    assert book.usd == pytest.approx({("", IDLE): 0, ("a", PREFILL): 1, ("a", DECODE): 5})
    samples = {
        tuple(sample.labels.values()): sample.value
        for metric in book.collect()
        for sample in metric.samples
    }
    assert samples["prefill",] == pytest.approx(1e6 * 1 / 10)
    assert samples["decode",] == pytest.approx(1e6 * 5 / 6)
    assert samples["all",] == pytest.approx(1e6 * 6 / 16)


def test_who_got_no_token_does_not_pay(book: CostBook, clock: Clock) -> None:
    guest = book.enter(answered(0.0, 0.0, 0), "a")
    clock.now_s += 3
    book.settle()
    assert sum(book.usd.values()) == 0  # it may get one yet
    book.leave(guest)
    assert book.usd["", IDLE] == 3 and sum(book.usd.values()) == 3


async def test_the_metrics_tell_it_by_the_keys_tenant(tmp_path: Path) -> None:
    prices, keys = tmp_path / "prices.toml", tmp_path / "keys.toml"
    prices.write_text("usd_per_gpu_hour = 3600.0\nnum_gpus = 2\n")
    key, digest = new_key()
    keys.write_text(
        f'[[keys]]\nname = "k"\nsha256 = "{digest}"\ntenant = "acme"\n'
        'scopes = ["inference", "metrics"]\n'
    )
    config = ServerConfig(cost_file=str(prices), api_key_file=str(keys))
    engine = FakeEngine()
    engine.script.token_delay_s = 0.02
    async with client_of(engine, config) as client:
        client.headers["authorization"] = f"Bearer {key}"
        bodies = [{"prompt": "Hello", "max_tokens": 5, "stream": s} for s in (False, True)]
        replies = await asyncio.gather(
            *[client.post("/v1/completions", json=body) for body in bodies]
        )
        assert [reply.status_code for reply in replies] == [200, 200]
        text = (await client.get("/metrics")).text
    found = {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "cost" in sample.name
    }
    assert found["octavo_cost_usd_total", "decode", "acme"] > 0
    assert {key[1:] for key in found if key[0] == "octavo_cost_usd_total"} == {
        ("idle", ""),
        ("prefill", "acme"),
        ("decode", "acme"),
    }
    assert {key[1] for key in found if key[0] == "octavo_cost_usd_per_million_tokens"} == {
        "prefill",
        "decode",
        "all",
    }


async def test_without_a_file_nothing_is_told() -> None:
    async with client_of(FakeEngine(), CONFIG) as client:
        assert "cost" not in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no price"),
        ("usd_per_gpu_hour = -1", "not valid"),
        ("usd_per_gpu_hour = nan", "not valid"),
        ("usd_per_gpu_hour = 'much'", "not valid"),
        ("usd_per_gpu_day = 3", "not valid"),
        ("usd_per_gpu_hour = 1\nnum_gpus = 0", "not valid"),
        ("usd_per_joule = 1e-8", "give busy_watts"),
        ("= 1", "not valid"),
        (None, "cannot read"),
    ],
)
def test_price_files_that_cannot_be_counted_with(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "prices.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        create_app(FakeEngine(), ServerConfig(cost_file=str(path)))
