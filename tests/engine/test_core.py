"""The engine loop on a fake executor: every request ends once, with the text it must have."""

import random

import pytest
from helpers import (
    VOCAB_SIZE,
    create_core,
    create_executor,
    create_request,
    create_scheduler,
    run_to_end,
    tokens_of,
)

from octavo.core import FailureCode, FinishReason, RequestOptions, SampledTokens, StepResult
from octavo.errors import EngineDeadError
from octavo.scheduler import BATCHINGS, POLICIES
from octavo.sim import oracle_tokens


@pytest.mark.parametrize("seed", range(150))
def test_any_workload_on_any_pool_gives_each_request_its_text_and_one_end(seed):
    rng = random.Random(seed)
    scheduler = create_scheduler(
        num_blocks=rng.randint(18, 60),
        max_num_batched_tokens=rng.randint(1, 40),
        max_num_seqs=rng.randint(1, 10),
        prefix_caching=rng.random() < 0.6,
        policy=rng.choice(sorted(POLICIES)),
        batching=rng.choice(BATCHINGS),
    )
    core = create_core(scheduler, asynchronous=seed % 3 == 0)
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(20)] for _ in range(3)]
    requests = [
        create_request(
            prompt=rng.choice(beginnings)[: rng.randint(1, 20)]
            + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 20))],
            max_tokens=rng.randint(1, 30),
            options=RequestOptions(
                cache_salt=rng.choice((None, None, "tenant")),
                priority=rng.randint(0, 2),
                tenant=rng.choice("ab"),
            ),
        )
        for _ in range(16)
    ]
    aborted, events = set(), []
    waiting = list(requests)
    while waiting or core.has_work:
        while waiting and rng.random() < 0.4:
            core.add(waiting.pop())
        if core.has_work and rng.random() < 0.05:
            request_id = rng.choice(requests).request_id
            news = core.abort([request_id])
            aborted |= {event.request_id for event in news}
            events += news
        events += core.step()
    for request in requests:
        expected = oracle_tokens(request.prompt_token_ids, request.sampling.max_tokens, VOCAB_SIZE)
        got = tokens_of(events, request.request_id)
        ends = [
            e.finish_reason
            for e in events
            if e.request_id == request.request_id and e.finish_reason is not None
        ]
        if request.request_id in aborted:
            assert ends == [FinishReason.ABORT] and got == expected[: len(got)]
        else:
            assert ends == [FinishReason.LENGTH] and got == expected
    assert scheduler.stats().num_free_blocks == scheduler.stats().num_blocks


class FlakyExecutor:
    """Fails at the steps it is told to; answers through another executor otherwise."""

    def __init__(self, executor, failing_steps, error=RuntimeError):
        self._executor = executor
        self._failing_steps = failing_steps
        self._error = error("no memory for this step")

    def execute(self, plan):
        result = self._executor.execute(plan)
        if plan.step in self._failing_steps:
            raise self._error
        return result


def test_a_failed_step_ends_its_requests_only_and_the_engine_goes_on():
    scheduler = create_scheduler()
    core = create_core(scheduler, FlakyExecutor(create_executor(scheduler), {2}))
    first = create_request(5, max_tokens=8)
    core.add(first)
    core.step()
    (event,) = core.step()
    assert event.finish_reason is FinishReason.ERROR
    assert "failed" in event.error and "memory" not in event.error  # no internals for clients
    second = create_request(5, max_tokens=3)
    core.add(second)
    events = run_to_end(core)
    assert tokens_of(events, second.request_id) == oracle_tokens(
        second.prompt_token_ids, 3, VOCAB_SIZE
    )


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_where_memory_runs_out_the_youngest_gives_way_and_the_others_lose_nothing(
    asynchronous, prefix_caching
):
    scheduler = create_scheduler(prefix_caching=prefix_caching)
    executor = FlakyExecutor(create_executor(scheduler), {4}, MemoryError)
    core = create_core(scheduler, executor, asynchronous=asynchronous)
    requests = [create_request(n, max_tokens=8) for n in (5, 6, 7)]
    waiting = [create_request(4, max_tokens=8) for _ in range(6)]
    for request in (*requests, *waiting):
        core.add(request)
    events = run_to_end(core)
    errors = [event for event in events if event.error is not None]
    (error,) = errors
    assert error.error_code is FailureCode.OUT_OF_MEMORY
    assert "gave way" in error.error and "for this step" not in error.error  # nothing internal
    # By the fourth step the first eight had places: the youngest of them is the last.
    assert error.request_id == waiting[4].request_id
    for request in (*requests, *waiting):
        if request.request_id != error.request_id:
            expected = oracle_tokens(request.prompt_token_ids, 8, VOCAB_SIZE)
            assert tokens_of(events, request.request_id) == expected
    assert scheduler.stats().num_free_blocks == scheduler.stats().num_blocks


class SizedExecutor:
    """Has memory for so many tokens a step, and notes the sizes of its steps."""

    def __init__(self, executor, num_tokens):
        self._executor = executor
        self._num_tokens = num_tokens
        self.sizes = []

    def execute(self, plan):
        self.sizes.append(plan.num_tokens)
        if plan.num_tokens > self._num_tokens:
            raise MemoryError
        return self._executor.execute(plan)


def test_after_a_step_without_memory_steps_are_small_and_grow_again():
    scheduler = create_scheduler(max_num_batched_tokens=16, max_num_seqs=2, prefix_caching=False)
    executor = SizedExecutor(create_executor(scheduler), 15)
    core = create_core(scheduler, executor)
    core.add(create_request(14, max_tokens=2))  # the older one
    core.add(create_request(14, max_tokens=2))
    events = run_to_end(core)
    assert executor.sizes == [16, 8, 6, 1]  # not 14 at once, though they would have fitted
    assert len([event for event in events if event.error is not None]) == 1
    executor.sizes.clear()
    executor._num_tokens = 16
    core.add(create_request(40, max_tokens=1))
    run_to_end(core)
    assert max(executor.sizes) == 16


def test_two_failed_steps_in_a_row_end_the_engine_with_the_cause():
    scheduler = create_scheduler()
    core = create_core(scheduler, FlakyExecutor(create_executor(scheduler), {1, 2}))
    core.add(create_request())
    core.step()
    core.add(create_request())
    with pytest.raises(EngineDeadError, match="RuntimeError: no memory for this step"):
        core.step()


class NanExecutor:
    """Gives one request an error instead of a token."""

    def __init__(self, executor, victim):
        self._executor = executor
        self._victim = victim

    def execute(self, plan):
        result = self._executor.execute(plan)
        return StepResult(
            result.step,
            tuple(
                SampledTokens(s.sequence_id, (), error="not finite")
                if s.sequence_id == self._victim
                else s
                for s in result.sampled
            ),
        )


def test_one_bad_row_fails_alone():
    scheduler = create_scheduler()
    good, bad = create_request(5, max_tokens=4), create_request(6, max_tokens=4)
    core = create_core(scheduler, NanExecutor(create_executor(scheduler), bad.request_id))
    core.add(good)
    core.add(bad)
    events = run_to_end(core)
    errors = [e for e in events if e.finish_reason is FinishReason.ERROR]
    assert [(e.request_id, e.error) for e in errors] == [(bad.request_id, "not finite")]
    assert tokens_of(events, good.request_id) == oracle_tokens(good.prompt_token_ids, 4, VOCAB_SIZE)
