"""What the first event of a request says about its way there, in virtual time."""

from helpers import create_core, create_executor, create_request, create_scheduler

from octavo.core import RequestEvent
from octavo.sim import VirtualClock

STEP_S = 1.0


def run(scheduler, clock) -> dict[str, list[RequestEvent]]:
    """All events of each request; every step takes a second."""
    core = create_core(scheduler, Timed(scheduler, clock))
    events: dict[str, list[RequestEvent]] = {}
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
    return events


class Timed:
    """The fake executor, with time."""

    def __init__(self, scheduler, clock):
        self._executor, self._clock = create_executor(scheduler), clock

    def execute(self, plan):
        self._clock.advance(STEP_S)
        return self._executor.execute(plan)


def times_of(event):
    return event.queue_time_s, event.prefill_time_s


def test_the_first_event_says_how_long_a_request_waited_and_computed():
    clock = VirtualClock()
    scheduler = create_scheduler(clock=clock, max_num_seqs=1, max_num_batched_tokens=16)
    scheduler.add(create_request(40, max_tokens=3, request_id="first"))
    clock.advance(0.5)
    scheduler.add(create_request(5, max_tokens=2, request_id="second"))
    clock.advance(0.25)
    events = run(scheduler, clock)
    # Three chunks of a prompt, and two more steps for tokens.
    assert [times_of(event) for event in events["first"]] == [(0.75, 3.0), (0, 0), (0, 0)]
    assert [times_of(event) for event in events["second"]] == [(0.25 + 5.0, 1.0), (0, 0)]


def test_who_comes_back_after_preemption_has_not_waited_twice():
    clock = VirtualClock()
    scheduler = create_scheduler(clock=clock, num_blocks=8, block_size=4)
    for name in "ab":
        scheduler.add(create_request(9, max_tokens=18, request_id=name))
    events = run(scheduler, clock)
    assert scheduler.stats().num_preemptions > 0
    for name in "ab":
        first, *others = events[name]
        assert times_of(first)[0] <= 1.0
        assert {times_of(event) for event in others} == {(0, 0)}


def test_further_answers_wait_for_the_prompt():
    clock = VirtualClock()
    scheduler = create_scheduler(clock=clock, max_num_batched_tokens=16)
    scheduler.add(*(create_request(20, max_tokens=2, request_id=f"r#{i}") for i in range(3)))
    events = run(scheduler, clock)
    assert [times_of(events[f"r#{i}"][0]) for i in range(3)] == [(0, 2.0), (2.0, 1.0), (2.0, 1.0)]


def test_a_beam_search_accounts_for_all_of_its_time():
    clock = VirtualClock()
    scheduler = create_scheduler(clock=clock)
    options = {"max_tokens": 4, "n": 3, "use_beam_search": True, "temperature": 0}
    clock.advance(7.0)
    scheduler.add(*(create_request(5, request_id=f"r#{i}", **options) for i in range(3)))
    clock.advance(0.5)
    events = run(scheduler, clock)
    for index in range(3):
        [event] = events[f"r#{index}"]
        assert sum(times_of(event)) == clock.now() - 7.0
        assert min(times_of(event)) >= 0
    assert times_of(events["r#0"][0]) == (0.5, clock.now() - 7.5)


def test_who_leaves_before_the_first_token_has_no_times():
    clock = VirtualClock()
    scheduler = create_scheduler(clock=clock)
    scheduler.add(create_request(5, request_id="r"))
    clock.advance(3.0)
    [event] = scheduler.abort(["r"])
    assert times_of(event) == (0, 0)
