"""Slots of adapters: who may run together, who waits and why, and that nobody waits for ever."""

import pytest

from octavo.core import Adapter, Request, RequestOptions, SampledTokens, SamplingParams, StepResult
from octavo.kvcache import create_allocator
from octavo.scheduler import SchedulerSettings, adapters_in_use, create_scheduler
from octavo.scheduler.adapters import PATIENCE_STEPS


def request(name, adapter=None, *, max_tokens=3):
    return Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        seed=0,
        options=RequestOptions(adapter=adapter and Adapter(adapter, f"digest of {adapter}")),
    )


def create(max_loras, **settings):
    defaults = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 4096}
    allocator = create_allocator("paged+prefix", 512, 16, max_model_len=4096)
    settings = SchedulerSettings(**defaults | settings, max_loras=max_loras)
    return create_scheduler(allocator, settings)


def step(scheduler):
    """One step, in which everybody who should gets a token; returns (who ran, the events)."""
    plan = scheduler.schedule()
    sampled = tuple(SampledTokens(s.sequence_id, (7,)) for s in plan.scheduled if s.samples)
    events = scheduler.commit(plan, StepResult(plan.step, sampled))
    scheduler.check_integrity()
    return [share.sequence_id for share in plan.scheduled], events


def test_a_step_holds_so_many_adapters_and_others_pass():
    scheduler = create(max_loras=2)
    for name, adapter in (("1", "a"), ("2", "b"), ("3", "c"), ("4", "a"), ("5", None), ("6", "b")):
        scheduler.add(request(name, adapter))
    assert step(scheduler)[0] == ["1", "2", "4", "5", "6"]
    [reason] = scheduler.decisions.why("3").values()
    assert "adapter slots (a step holds at most 2 adapters, and as many others run)" in reason[-1]
    stats = scheduler.stats()
    assert stats.waiting_by_reason == {"adapter slots": 1}
    assert stats.adapters == {"a": (2, 0), "b": (2, 0), "c": (0, 1)}
    assert stats.max_loras == 2
    assert adapters_in_use(scheduler) == {f"digest of {name}" for name in "abc"}
    step(scheduler)
    step(scheduler)  # all five are done
    assert step(scheduler)[0] == ["3"]


def test_the_runner_hears_which_adapter_a_sequence_has():
    scheduler = create(max_loras=1)
    scheduler.add(request("1", "a"))
    scheduler.add(request("2"))
    introduced = {new.sequence_id: new.adapter for new in scheduler.schedule().new}
    assert introduced == {"1": "digest of a", "2": None}


def test_versions_of_one_name_are_two_adapters():
    scheduler = create(max_loras=1)
    for name, digest in (("1", "x"), ("2", "y")):
        options = RequestOptions(adapter=Adapter("a", digest))
        scheduler.add(Request(**{f: getattr(request(name), f) for f in FIELDS}, options=options))
    assert step(scheduler)[0] == ["1"]


FIELDS = ("request_id", "prompt_token_ids", "sampling", "seed")


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_a_stream_of_others_keeps_nobody_out_for_ever(policy):
    """There is always somebody with the adapter that holds the slot, and more of them come."""
    scheduler = create(max_loras=1, policy=policy)
    scheduler.add(request("0", "a", max_tokens=10))
    step(scheduler)
    scheduler.add(request("late", "b"))
    for number in range(1, 2 * PATIENCE_STEPS):
        if number % 5 == 0:
            scheduler.add(request(str(number), "a", max_tokens=10))
            scheduler.add(request(f"base {number}", None, max_tokens=2))
        ran, _ = step(scheduler)
        if "late" in ran:
            break
        assert any(name.isdecimal() for name in ran) or number > PATIENCE_STEPS
    assert PATIENCE_STEPS <= number < PATIENCE_STEPS + 30
    # Those who came after it waited with it, but for those without an adapter.
    waiting = [s.request_id for s in scheduler.statuses() if s.status == "waiting"]
    assert waiting and all(name.isdecimal() for name in waiting)
    for _ in range(40):
        step(scheduler)
    assert not scheduler.has_work


def test_who_is_pushed_out_makes_room():
    scheduler = create(max_loras=1, policy="priority", max_num_seqs=1)
    scheduler.add(request("low", "a", max_tokens=50))
    step(scheduler)
    high = request("high", "b")
    options = RequestOptions(adapter=high.options.adapter, priority=-1)
    scheduler.add(Request(**{f: getattr(high, f) for f in FIELDS}, options=options))
    assert step(scheduler)[0] == ["high"]
    for _ in range(60):
        step(scheduler)
    assert not scheduler.has_work


def test_without_adapters_nothing_is_counted():
    scheduler = create(max_loras=0)
    scheduler.add(request("1"))
    assert (scheduler.stats().adapters, scheduler.stats().max_loras) == ({}, 0)
