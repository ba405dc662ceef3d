"""Thousands of small worlds, each with its own workload and faults: every promise holds in all."""

import re
from collections import Counter

import pytest

from octavo.core import FinishReason, Tier
from octavo.engine import EngineCore
from octavo.scheduler import BATCHINGS, POLICIES
from octavo.sim import Fault, Parts
from octavo.sim.swarm import SwarmFailure, draw_scenario, main, quiet_engine, run_seed

NUM_SEEDS_A_TEST = 250


@pytest.fixture(autouse=True)
def no_log_of_steps_that_fail_on_purpose():
    with quiet_engine():
        yield


@pytest.mark.parametrize("first", range(0, 2500, NUM_SEEDS_A_TEST))
def test_every_promise_holds(first):
    for seed in range(first, first + NUM_SEEDS_A_TEST):
        run_seed(seed)


def tiers_used(engine):
    """What moved between the tiers in a run, by the stories and the allocator's own books."""
    stories = engine.scheduler.decisions.why("").values()
    used = Counter(swapped=sum("host memory" in line for story in stories for line in story))
    used["to disk"] = engine.moves[Tier.HOST, Tier.DISK]
    used["from disk"] = engine.moves[Tier.DISK, Tier.DEVICE]
    return used


def test_the_swarm_reaches_every_corner():
    """A test that never preempts proves nothing about preemption."""
    seen = Counter()
    for seed in range(600):
        engine = run_seed(seed)
        setup, stats = engine.setup, engine.core.stats()
        seen["engines that died"] += engine.history.engine_died
        seen["refused"] += engine.history.num_refused
        seen["preemptions"] += stats.num_preemptions
        seen[setup.policy] += 1
        seen[setup.batching] += 1
        seen[setup.allocator] += any(c.num_output_tokens for c in engine.history.clients)
        seen["asynchronous"] += setup.asynchronous
        seen["siblings"] += any("." in c.request.request_id for c in engine.history.clients)
        seen["drafts"] += setup.num_drafts > 0
        seen["lost blocks"] += engine.history.num_injected[Fault.LOST_BLOCK]
        seen.update(tiers_used(engine))
        for client in engine.history.clients:
            seen[client.end] += 1
            seen[client.fault] += client.fault is not None
            seen["prefix hits"] += client.num_cached_tokens > 0
            seen["aborted after a token"] += client.cancelled and client.num_output_tokens > 0
    # A slow step changes nobody's outcome, nor does a block that is computed again.
    touching = set(Fault) - {Fault.SLOW, Fault.LOST_BLOCK}
    allocators = ("contiguous", "contiguous-buddy", "paged")
    every = {*touching, *FinishReason, *POLICIES, *BATCHINGS, *allocators}
    assert not [what for what in every if not seen[what]]
    assert seen["engines that died"] >= 1
    assert seen["preemptions"] >= 50
    assert min(seen["siblings"], seen["drafts"]) >= 100
    assert min(seen["swapped"], seen["to disk"], seen["from disk"], seen["lost blocks"]) >= 5
    assert min(seen["refused"], seen["prefix hits"], seen["asynchronous"]) >= 100
    assert seen["aborted after a token"] >= 20


def what_clients_saw(seed):
    engine = run_seed(seed)
    return [
        (c.request.request_id, c.token_ids, c.end, c.error, c.fault, c.accepted_at_s, c.ended_at_s)
        for c in engine.history.clients
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_the_whole_story(seed):
    assert draw_scenario(seed) == draw_scenario(seed)
    assert what_clients_saw(seed) == what_clients_saw(seed)


class LosesEnds(EngineCore):
    """An engine loop that forgets to say what ends a request."""

    def step(self):
        return [event for event in super().step() if event.finish_reason is None]


def test_a_failure_says_what_broke_and_how_to_see_it_again():
    broken = Parts(core=lambda scheduler, executor, setup: LosesEnds(scheduler, executor))
    with pytest.raises(SwarmFailure) as failure:
        run_seed(0, parts=broken)
    text = str(failure.value)
    assert text.startswith("seed 0 failed at step ")
    assert "clients have no end: ['r" in text
    assert "replay: python -m octavo.sim.swarm --seed 0" in text
    assert "last steps" in text and re.search(r"t=\d.\d+s step \d+: r\d+\+\d+", text)


def test_the_command_replays_one_seed_and_soaks_many(capsys):
    assert main(["--seed", "3"]) == 0
    assert "seed 3: EngineSetup(" in capsys.readouterr().out
    assert main(["--seeds", "0", "20"]) == 0
    assert "20 seeds, 0 failed" in capsys.readouterr().out
