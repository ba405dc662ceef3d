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

from octavo.core import FinishReason, StepResult
from octavo.errors import CapacityError, ContextLengthError, IntegrityError, RequestError
from octavo.sim import oracle_tokens


def shares(plan):
    return {share.sequence_id: share.num_tokens for share in plan.scheduled}


def step(scheduler, executor):
    plan = scheduler.schedule()
    events = scheduler.commit(plan, executor.execute(plan))
    scheduler.check_integrity()
    return plan, events


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget():
    scheduler = create_scheduler(max_num_batched_tokens=16)
    executor = create_executor(scheduler)
    request = create_request(40, max_tokens=2)
    scheduler.add(request)
    sizes, events = [], []
    while scheduler.has_work:
        plan, news = step(scheduler, executor)
        sizes.append(plan.num_tokens)
        events += news
    assert sizes == [16, 16, 8, 1]
    assert [len(event.token_ids) for event in events] == [1, 1]


def test_decodes_go_first_and_prefill_fills_the_rest_of_the_budget():
    scheduler = create_scheduler(max_num_batched_tokens=16)
    executor = create_executor(scheduler)
    first, second = create_request(4, max_tokens=9), create_request(40, max_tokens=1)
    scheduler.add(first)
    step(scheduler, executor)
    scheduler.add(second)
    plan, _ = step(scheduler, executor)
    assert shares(plan) == {first.request_id: 1, second.request_id: 15}


def test_only_so_many_sequences_run_at_once():
    scheduler = create_scheduler(max_num_seqs=2)
    for _ in range(3):
        scheduler.add(create_request(2))
    plan = scheduler.schedule()
    assert len(plan.scheduled) == 2
    assert scheduler.stats().num_waiting == 1


def test_waiting_requests_are_admitted_in_order_of_arrival():
    scheduler = create_scheduler(num_blocks=4, block_size=4)
    executor = create_executor(scheduler)
    requests = [create_request(8, max_tokens=1), create_request(12, max_tokens=1)]
    requests.append(create_request(1, max_tokens=1))  # would fit, but must not overtake
    for request in requests:
        scheduler.add(request)
    plan, _ = step(scheduler, executor)
    assert list(shares(plan)) == [requests[0].request_id]


def test_when_blocks_run_out_the_youngest_is_recomputed_and_nothing_changes_in_its_text():
    scheduler = create_scheduler(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    core = create_core(scheduler)
    requests = [create_request(10, max_tokens=16) for _ in range(3)]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    assert scheduler.stats().num_preemptions > 0
    for request in requests:
        expected = oracle_tokens(request.prompt_token_ids, 16, VOCAB_SIZE)
        assert tokens_of(events, request.request_id) == expected
    assert scheduler.stats().num_free_blocks == 8


def test_the_plan_is_a_difference():
    scheduler = create_scheduler()
    executor = create_executor(scheduler)
    request = create_request(4, max_tokens=6)
    scheduler.add(request)
    first, _ = step(scheduler, executor)
    second, _ = step(scheduler, executor)
    assert [new.sequence_id for new in first.new] == [request.request_id]
    assert first.new[0].token_ids == tuple(request.prompt_token_ids)
    assert second.new == ()
    assert len(second.scheduled[0].new_block_ids) == 1  # the fifth token opens a block


def test_the_runner_is_told_once_of_everyone_who_left():
    scheduler = create_scheduler()
    executor = create_executor(scheduler)
    finished, aborted = create_request(4, max_tokens=1), create_request(4, max_tokens=50)
    scheduler.add(finished)
    scheduler.add(aborted)
    step(scheduler, executor)
    scheduler.abort([aborted.request_id])
    plan, _ = step(scheduler, executor)
    assert sorted(plan.dropped) == sorted([finished.request_id, aborted.request_id])
    assert executor.num_rows == 0
    assert step(scheduler, executor)[0].dropped == ()


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5])
def test_an_abort_in_any_state_frees_everything_and_tells_exactly_once(num_steps):
    scheduler = create_scheduler(max_num_batched_tokens=8)
    executor = create_executor(scheduler)
    request = create_request(20, max_tokens=50)
    scheduler.add(request)
    for _ in range(num_steps):
        step(scheduler, executor)
    events = scheduler.abort([request.request_id, request.request_id, "unknown"])
    assert [(e.request_id, e.finish_reason) for e in events] == [
        (request.request_id, FinishReason.ABORT)
    ]
    scheduler.check_integrity()
    stats = scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert not scheduler.has_work


def test_a_request_that_could_never_fit_is_refused_with_both_numbers():
    scheduler = create_scheduler(num_blocks=4, block_size=4, max_model_len=256)
    with pytest.raises(CapacityError, match=r"needs 5 KV blocks .* has 4"):
        scheduler.add(create_request(10, max_tokens=8))
    scheduler.add(create_request(10, max_tokens=7))  # 16 tokens to compute: exactly the pool


def test_a_request_longer_than_the_context_is_refused_with_both_numbers():
    scheduler = create_scheduler(max_model_len=32)
    with pytest.raises(ContextLengthError, match=r"33.*32"):
        scheduler.add(create_request(30, max_tokens=3))
    with pytest.raises(ContextLengthError, match="32 tokens"):
        scheduler.add(create_request(32, max_tokens=1))


def test_an_id_can_be_used_again_only_after_its_end():
    scheduler = create_scheduler()
    executor = create_executor(scheduler)
    scheduler.add(create_request(4, max_tokens=1, request_id="a"))
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(create_request(4, request_id="a"))
    step(scheduler, executor)
    scheduler.add(create_request(6, max_tokens=1, request_id="a"))
    plan, events = step(scheduler, executor)
    assert plan.dropped == ("a",) and plan.new[0].sequence_id == "a"
    assert events[0].finish_reason is FinishReason.LENGTH


def test_the_result_of_another_step_is_not_taken():
    scheduler = create_scheduler()
    scheduler.add(create_request())
    plan = scheduler.schedule()
    with pytest.raises(IntegrityError):
        scheduler.commit(plan, StepResult(plan.step + 1, ()))


def test_stop_tokens_end_a_sequence_unless_they_are_to_be_ignored():
    prompt = create_request(5, request_id="p").prompt_token_ids
    third = oracle_tokens(prompt, 3, VOCAB_SIZE)[2]
    for ignore, expected in ((False, FinishReason.STOP), (True, FinishReason.LENGTH)):
        core = create_core(create_scheduler())
        request = create_request(5, max_tokens=6, request_id="p", ignore_eos=ignore)
        core.add(
            type(request)(
                **{f: getattr(request, f) for f in request.__struct_fields__}
                | {"eos_token_ids": (third,)}
            )
        )
        events = run_to_end(core)
        assert events[-1].finish_reason is expected
        assert len(tokens_of(events, "p")) == (6 if ignore else 3)
