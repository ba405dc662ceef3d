"""Bugs that the swarm found in Octavo, each as the smallest story that shows it.

The promises are kept by the simulation itself: a story that comes to its end has kept them all.
"""

import pytest

from octavo.core import FinishReason, Request, SamplingParams
from octavo.sim import Arrive, Cancel, EngineSetup, Fault, Faults, SimulatedEngine
from octavo.sim.swarm import quiet_engine

LOOPS = [
    pytest.param({"asynchronous": False}, id="plain"),
    pytest.param({"asynchronous": True, "eager": True}, id="ahead, eager"),
    pytest.param({"asynchronous": True, "eager": False}, id="ahead, lazy"),
]
PROMPT = list(range(1, 11))


@pytest.fixture(autouse=True)
def no_log_of_steps_that_fail_on_purpose():
    with quiet_engine():
        yield


def arrive(request_id, at_s, prompt=PROMPT, max_tokens=4):
    sampling = SamplingParams(max_tokens=max_tokens)
    request = Request(
        request_id=request_id, prompt_token_ids=list(prompt), sampling=sampling, seed=0
    )
    return Arrive(at_s=at_s, request=request)


def play(actions, *, loop, at_steps=None, **setup):
    setup = {"block_size": 4, "num_blocks": 32} | setup
    engine = SimulatedEngine(EngineSetup(**setup, **loop), faults=Faults(at_steps=at_steps or {}))
    engine.run(actions)
    engine.probe()
    return {client.request.request_id: client for client in engine.history.clients}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_without_a_prompt_is_refused_and_does_not_block_the_queue(loop):
    """Seed 19: it was queued, had nothing to run, and stood before everyone else for ever."""
    clients = play([arrive("empty", 0.0, prompt=[]), arrive("next", 0.0)], loop=loop)
    assert [c.end for c in clients.values()] == [FinishReason.LENGTH] * 2  # next and the probe
    assert "empty" not in clients


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.DOUBLE_REPLY, Fault.FOREIGN_REPLY])
def test_a_reply_that_does_not_match_its_plan_leaves_nobody_without_an_end(fault, loop):
    """Seeds 6 and 14: without a token it hung for ever; with two its text went wrong."""
    actions = [arrive("a", 0.0), arrive("b", 0.0, max_tokens=9)]
    clients = play(actions, loop=loop, at_steps={2: fault})
    assert all(client.end is not None for client in clients.values())


@pytest.mark.parametrize("loop", LOOPS)
def test_the_runner_forgets_who_left_though_the_step_that_said_so_failed(loop):
    """Seed 59: a plan that failed before it was applied took its list of the gone with it."""
    actions = [arrive("goes", 0.0, max_tokens=50), Cancel(at_s=0.02, request_ids=("goes",))]
    actions += [arrive("fails", 0.02), arrive("later", 1.0)]
    clients = play(actions, loop=loop, at_steps={3: Fault.FAIL_BEFORE})
    assert clients["goes"].end is FinishReason.ABORT
    assert clients["fails"].end is FinishReason.ERROR
    assert clients["later"].end is FinishReason.LENGTH


@pytest.mark.parametrize("loop", LOOPS)
def test_kv_that_is_not_finite_is_never_found_by_others(loop):
    """Seed 614: the blocks of a failed sequence were named, and poisoned all who sent the same."""
    actions = [arrive("bad", 0.0), arrive("same", 0.5), arrive("again", 1.0)]
    clients = play(actions, loop=loop, at_steps={1: Fault.NOT_FINITE})
    assert clients["bad"].end is FinishReason.ERROR
    assert clients["same"].end is clients["again"].end is FinishReason.LENGTH
    assert clients["again"].num_cached_tokens == 8


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER, Fault.LATE_REPLY])
def test_one_failed_step_is_no_reason_to_die_though_the_next_was_under_way(fault, loop):
    """Asynchronously the next step ran on what the failed one had left, and failed as well."""
    actions = [arrive("a", 0.0, max_tokens=9), arrive("b", 0.0), arrive("c", 0.015)]
    clients = play([*actions, arrive("later", 2.0)], loop=loop, at_steps={2: fault})
    assert clients["a"].end is clients["b"].end is FinishReason.ERROR
    assert clients["later"].end is FinishReason.LENGTH
