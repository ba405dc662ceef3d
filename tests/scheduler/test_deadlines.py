"""A deadline that passes in the queue ends a request, and nothing of it was computed."""

import pytest
from helpers import create_core, create_request, create_scheduler, run_to_end, tokens_of

from octavo.core import FailureCode, FinishReason, RequestOptions
from octavo.errors import RequestError
from octavo.scheduler.deadlines import Deadlines
from octavo.sim import VirtualClock


def due_in(deadline_ms, num_prompt_tokens=5, **fields):
    options = RequestOptions(deadline_ms=deadline_ms)
    return create_request(num_prompt_tokens, options=options, **fields)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_needs_no_place_and_no_memory_to_be_told_and_is_told_once(asynchronous):
    clock = VirtualClock()
    scheduler = create_scheduler(max_num_seqs=1, clock=clock)
    core = create_core(scheduler, asynchronous=asynchronous)
    runs, late, patient = create_request(5, max_tokens=20), due_in(100), create_request(6)
    for request in (runs, late, patient):
        core.add(request)
    events = core.step()
    clock.advance(0.1)
    events += core.step()
    assert not [event for event in events if event.finish_reason]
    clock.advance(0.001)
    (end,) = [event for event in core.step() if event.finish_reason]
    assert (end.request_id, end.finish_reason) == (late.request_id, FinishReason.ERROR)
    assert end.error_code is FailureCode.DEADLINE_EXCEEDED and end.token_ids == ()
    assert scheduler.stats().num_running == 1  # the place was taken all the time
    assert late.request_id not in str(run_to_end(core))
    assert scheduler.stats().num_prompt_tokens == 11  # of the two others


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_has_begun_is_late_but_whole(asynchronous):
    clock = VirtualClock()
    scheduler = create_scheduler(max_num_batched_tokens=4, clock=clock)
    core = create_core(scheduler, asynchronous=asynchronous)
    request = due_in(100, 40, max_tokens=3)
    core.add(request)
    core.step()
    clock.advance(10.0)  # in the middle of its prompt
    assert len(tokens_of(run_to_end(core), request.request_id)) == 3


def test_the_answers_to_one_prompt_are_late_together_and_never_after_it_began():
    clock = VirtualClock()
    scheduler = create_scheduler(max_num_seqs=1, clock=clock)
    core = create_core(scheduler)
    begun = [due_in(100, 20, request_id=f"begun#{i}") for i in range(2)]
    waiting = [due_in(100, 5, request_id=f"waiting#{i}") for i in range(2)]
    core.add(*begun)
    core.step()
    core.add(*waiting)
    clock.advance(1.0)
    events = core.step()
    ends = {event.request_id: event.error_code for event in events if event.finish_reason}
    assert ends == dict.fromkeys(("waiting#0", "waiting#1"), FailureCode.DEADLINE_EXCEEDED)
    events += run_to_end(core)
    assert [len(tokens_of(events, request.request_id)) for request in begun] == [4, 4]


def test_a_beam_search_is_late_as_one():
    clock = VirtualClock()
    scheduler = create_scheduler(max_num_seqs=1, clock=clock)
    core = create_core(scheduler)
    core.add(create_request(5, max_tokens=20))
    core.step()
    beams = [
        due_in(100, 5, request_id=f"beams#{i}", use_beam_search=True, beam_width=2, n=2)
        for i in range(2)
    ]
    core.add(*beams)
    clock.advance(1.0)
    assert len([event for event in core.step() if event.finish_reason]) == 2
    run_to_end(core)


def test_books_of_deadlines_stay_small_whatever_deadlines_clients_name():
    scheduler = create_scheduler()
    core = create_core(scheduler)
    for _ in range(300):
        core.add(due_in(10**9, max_tokens=1))
        run_to_end(core)
    assert len(scheduler._deadlines) <= 65


def test_without_a_deadline_nothing_is_kept():
    deadlines = Deadlines()
    scheduler = create_scheduler()
    scheduler.add(create_request())
    (sequence,) = scheduler._waiting
    deadlines.add(sequence)
    assert len(deadlines) == 0 and deadlines.passed(1e12) == []


@pytest.mark.parametrize("deadline_ms", [0, -1, 2**31 + 1, 10**400])
def test_deadlines_that_are_none_are_refused(deadline_ms):
    with pytest.raises(RequestError, match="deadline_ms"):
        due_in(deadline_ms)
