"""Encoders' prompts: each runs whole in one step, needs no blocks, and ends once."""

from octavo.core import NO_TOKENS, PoolingParams, Reading, Request, StepResult
from octavo.kvcache import NoBlocks
from octavo.scheduler import SchedulerSettings, create_scheduler

BUDGET = 16


def scheduler_of(*lengths):
    settings = SchedulerSettings(
        max_num_batched_tokens=BUDGET, max_num_seqs=8, max_model_len=BUDGET, whole_prompts=True
    )
    scheduler = create_scheduler(NoBlocks(), settings)
    for i, length in enumerate(lengths):
        pooling = PoolingParams(pooling="mean")
        request = Request(
            request_id=str(i),
            prompt_token_ids=[1] * length,
            sampling=NO_TOKENS,
            seed=0,
            pooling=pooling,
        )
        scheduler.add(request)
    return scheduler


def run(scheduler):
    """(tokens of each step's shares, ids that ended)"""
    steps, ended = [], []
    while scheduler.has_work:
        plan = scheduler.schedule()
        steps.append([share.num_tokens for share in plan.scheduled])
        readings = tuple(Reading(share.sequence_id, vector=b"1234") for share in plan.scheduled)
        events = scheduler.commit(plan, StepResult(plan.step, (), readings=readings))
        ended += [event.request_id for event in events if event.finish_reason is not None]
        scheduler.check_integrity()
    return steps, ended


def test_a_prompt_that_does_not_fit_the_rest_of_a_step_waits_for_the_next():
    scheduler = scheduler_of(10, 6, 10, 16, 1)
    steps, ended = run(scheduler)
    assert steps == [[10, 6], [10], [16], [1]]
    assert sorted(ended) == ["0", "1", "2", "3", "4"]


def test_it_is_told_why_it_waits():
    scheduler = scheduler_of(10, 10)
    scheduler.schedule()
    [story] = scheduler.decisions.why("1").values()
    assert any("whole prompt" in line and "all 10 tokens" in line for line in story)


def test_after_a_step_without_memory_prompts_still_run_whole():
    scheduler = scheduler_of(10, 6, 16)
    plan = scheduler.schedule()
    scheduler.discard(plan, out_of_memory=True)
    steps, ended = run(scheduler)
    assert [tokens for step in steps for tokens in step] == [10, 6, 16]
    assert steps[0] == []  # half of the last step is less than the first of them
    assert sorted(ended) == ["0", "1", "2"]
