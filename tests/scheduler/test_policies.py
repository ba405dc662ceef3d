"""Who goes first and who gives way, policy by policy."""

import random

import pytest
from helpers import create_core, create_executor, create_request, create_scheduler, run_to_end

from octavo.core import FinishReason, RequestOptions, Sequence
from octavo.errors import OverloadedError
from octavo.scheduler import PrefillSpeed, QueueBounds, create_queue
from octavo.sim import VirtualClock


def request(name, num_prompt_tokens=4, max_tokens=4, **options):
    return create_request(
        num_prompt_tokens, max_tokens, request_id=name, options=RequestOptions(**options)
    )


def order_of_first_tokens(scheduler, requests):
    core = create_core(scheduler)
    for r in requests:
        core.add(r)
    seen = {}
    for event in run_to_end(core):
        seen.setdefault(event.request_id, len(seen))
    return list(seen)


def step(scheduler, executor):
    plan = scheduler.schedule()
    events = scheduler.commit(plan, executor.execute(plan))
    scheduler.check_integrity()
    return plan, events


def test_fcfs_serves_in_order_of_arrival():
    scheduler = create_scheduler(max_num_seqs=1)
    assert order_of_first_tokens(scheduler, [request(n) for n in "bca"]) == ["b", "c", "a"]


def test_priority_serves_the_lowest_number_first_and_equals_by_arrival():
    scheduler = create_scheduler(max_num_seqs=1, policy="priority")
    requests = [request("x", priority=5), request("y", priority=-1), request("z", priority=5)]
    assert order_of_first_tokens(scheduler, requests) == ["y", "x", "z"]


@pytest.mark.parametrize("limit", [{"max_num_seqs": 2}, {"num_blocks": 6}])
def test_an_urgent_request_pushes_a_lesser_one_out_for_places_and_for_blocks(limit):
    scheduler = create_scheduler(policy="priority", **limit)
    executor = create_executor(scheduler)
    for name, priority in (("high", 1), ("low", 9)):
        scheduler.add(request(name, 8, 4, priority=priority))
    step(scheduler, executor)
    scheduler.add(request("urgent", 8, 4, priority=0))
    plan, _ = step(scheduler, executor)
    assert {s.sequence_id for s in plan.scheduled} == {"high", "urgent"}
    assert plan.dropped == ("low",)
    assert any("preempted" in s for s in scheduler.decisions.why("low")["low"])
    while scheduler.has_work:
        step(scheduler, executor)


def test_equal_priorities_never_push_each_other_out():
    scheduler = create_scheduler(policy="priority", max_num_seqs=1)
    executor = create_executor(scheduler)
    scheduler.add(request("first", priority=3))
    step(scheduler, executor)
    scheduler.add(request("second", priority=3))
    step(scheduler, executor)
    assert scheduler.stats().num_preemptions == 0


def test_the_nearest_deadline_goes_first_and_those_without_one_last():
    scheduler = create_scheduler(max_num_seqs=1, policy="deadline")
    requests = [
        request("none"),
        request("late", deadline_ms=9000),
        request("soon", deadline_ms=50),
    ]
    assert order_of_first_tokens(scheduler, requests) == ["soon", "late", "none"]


def test_fair_gives_tenants_equal_service_whatever_they_send():
    """A flood from one tenant: the other gets its half (VTC, theorem 4.4: bounded difference)."""
    rng = random.Random(0)
    scheduler = create_scheduler(
        policy="fair", max_num_seqs=4, num_blocks=200, max_num_batched_tokens=64
    )
    executor = create_executor(scheduler)
    for i in range(120):
        scheduler.add(request(f"flood{i}", rng.randint(4, 40), rng.randint(4, 30), tenant="flood"))
    for i in range(30):
        scheduler.add(request(f"calm{i}", rng.randint(4, 40), rng.randint(4, 30), tenant="calm"))
    service = {"flood": 0, "calm": 0}
    worst = 0
    while any(r.startswith("calm") for r in scheduler._sequences):
        calm_waits = any(s.request.options.tenant == "calm" for s in scheduler._waiting)
        plan, _ = step(scheduler, executor)
        for share in plan.scheduled:
            # decodes count twice, as in the policy
            weight = share.num_tokens if share.num_tokens > 1 else 2
            service["flood" if share.sequence_id.startswith("flood") else "calm"] += weight
        if calm_waits:
            worst = max(worst, abs(service["flood"] - service["calm"]))
    assert worst < 2 * (40 + 2 * 30) * 4  # twice the largest request on all four places
    assert service["calm"] > 0.4 * service["flood"]


def test_an_idle_tenant_saves_nothing_up():
    scheduler = create_scheduler(policy="fair", max_num_seqs=1, num_blocks=200)
    executor = create_executor(scheduler)
    for i in range(20):
        scheduler.add(request(f"busy{i}", 8, 8, tenant="busy"))
    for _ in range(60):
        step(scheduler, executor)
    for i in range(20):
        scheduler.add(request(f"back{i}", 8, 8, tenant="back"))
    firsts = []
    while len(firsts) < 6:
        plan, _ = step(scheduler, executor)
        firsts += [new.sequence_id[:4] for new in plan.new]
    assert firsts.count("back") <= 4  # alternating, not a backlog of all it never used


def test_the_queue_is_bounded_by_requests_and_by_prompt_tokens():
    bounds = QueueBounds(PrefillSpeed(), max_num_reqs=2, max_num_tokens=30)
    scheduler = create_scheduler(max_num_seqs=1, bounds=bounds)
    scheduler.add(request("a", 10))
    scheduler.add(request("b", 10))
    with pytest.raises(OverloadedError, match="at most 2"):
        scheduler.add(request("c", 1))
    scheduler.abort(["b"])
    with pytest.raises(OverloadedError, match=r"10 prompt tokens.*25.*more than 30"):
        scheduler.add(request("d", 25))
    scheduler.add(request("e", 20))


def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once():
    clock = VirtualClock()
    scheduler = create_scheduler(policy="deadline", clock=clock, max_num_batched_tokens=100)
    executor = create_executor(scheduler)
    scheduler.add(request("measured", 100, 1))
    plan = scheduler.schedule()
    clock.advance(1.0)  # 100 prompt tokens a second
    scheduler.commit(plan, executor.execute(plan))
    scheduler.add(request("possible", 50, 1, deadline_ms=600))
    with pytest.raises(OverloadedError, match="1000 ms.*the 900 ms that are wanted") as caught:
        scheduler.add(request("impossible", 50, 1, deadline_ms=900))
    assert caught.value.retry_after_s == 1.0
    scheduler.check_integrity()


def test_a_target_ttft_bounds_the_queue_by_the_measured_speed():
    clock = VirtualClock()
    bounds = QueueBounds(PrefillSpeed(), target_ttft_ms=1200)
    scheduler = create_scheduler(clock=clock, bounds=bounds, max_num_batched_tokens=100)
    executor = create_executor(scheduler)
    scheduler.add(request("measured", 100, 1))  # nothing is known yet: taken
    plan = scheduler.schedule()
    clock.advance(1.0)
    scheduler.commit(plan, executor.execute(plan))
    scheduler.add(request("first", 60, 1))
    scheduler.add(request("second", 60, 1))
    with pytest.raises(OverloadedError, match="180 prompt tokens at 100 a second"):
        scheduler.add(request("third", 60, 1))
    scheduler.add(request("patient", 60, 1, deadline_ms=5000))


@pytest.mark.parametrize(
    "policy, expected",
    [("fcfs", 100 + 200 + 300), ("priority", 100), ("deadline", 200), ("fair", 100 + 150)],
)
def test_a_deadline_is_held_to_what_the_policy_serves_before(policy, expected):
    queue = create_queue(policy)

    def sequence(arrival, num_tokens, **options):
        made = create_request(num_tokens, 1, options=RequestOptions(**options))
        return Sequence(made, 1, arrival_s=float(arrival), arrival=arrival)

    queue.add(sequence(0, 100, priority=0, tenant="a"))
    queue.add(sequence(1, 200, priority=2, tenant="b", deadline_ms=10))
    queue.add(sequence(2, 300, priority=3, tenant="b", deadline_ms=90_000))
    newcomer = sequence(3, 50, priority=1, tenant="a", deadline_ms=1000)
    assert queue.tokens_ahead(newcomer) == expected


def test_the_story_of_a_request_names_what_bound_it_and_for_how_long():
    clock = VirtualClock()
    scheduler = create_scheduler(num_blocks=6, block_size=4, clock=clock, max_num_batched_tokens=64)
    executor = create_executor(scheduler)
    scheduler.add(request("first", 16, 4))
    scheduler.add(request("second", 12, 2))
    scheduler.add(request("third", 4, 2))
    step(scheduler, executor)
    clock.advance(0.412)
    assert scheduler.decisions.why("second")["second"] == [
        "waiting 0 ms: queued",
        "waiting 412 ms: blocks (needed 3, free 2, 1 kept for running requests; "
        "next free in at most 4 steps)",
    ]
    assert scheduler.decisions.why("third")["third"] == ["waiting 412 ms: queued"]
    assert scheduler.stats().waiting_by_reason == {"blocks": 1, "queued": 1}
    while scheduler.has_work:
        step(scheduler, executor)
        clock.advance(0.01)
    story = scheduler.decisions.why("second")["second"]
    assert story[-1] == "finished: length"
    assert story[-2].startswith("running 10 ms: admitted (0 of 12 tokens had their KV)")
    assert scheduler.decisions.why("nobody") == {}


def test_stories_are_bounded():
    scheduler = create_scheduler()
    executor = create_executor(scheduler)
    for i in range(1100):
        scheduler.add(request(f"r{i}", 2, 1))
        step(scheduler, executor)
    assert scheduler.decisions.why("r0") == {}
    assert scheduler.decisions.why("r1099") != {}


def sizes(batching, arrivals, **limits):
    """For each step the ids that ran, given {step: requests that arrive before it}."""
    clock = VirtualClock()
    scheduler = create_scheduler(batching=batching, clock=clock, **limits)
    executor = create_executor(scheduler)
    steps = []
    for number in range(200):
        for r in arrivals.get(number, ()):
            scheduler.add(r)
        plan, events = step(scheduler, executor)
        assert all(e.finish_reason is not FinishReason.ERROR for e in events)
        steps.append("".join(f"{s.sequence_id}{s.num_tokens} " for s in plan.scheduled).strip())
        clock.advance(0.01)
        if not scheduler.has_work and number >= max(arrivals):
            return steps
    raise AssertionError(f"still at work: {steps}")


def test_static_batches_let_nobody_join():
    arrivals = {0: [request("a", 4, 2), request("b", 4, 4)], 1: [request("c", 4, 2)]}
    assert sizes("static", arrivals) == ["a4 b4", "a1 b1", "b1", "b1", "c4", "c1"]


def test_static_batches_form_over_several_steps_where_prompts_are_long():
    arrivals = {0: [request(n, 12, 2) for n in "abc"]}
    assert sizes("static", arrivals, max_num_batched_tokens=16) == [
        "a12 b4",
        "b8 c8",
        "c4",
        "a1 b1 c1",
    ]


def test_dynamic_batches_wait_for_company_but_not_for_long():
    alone = sizes("dynamic", {0: [request("a", 4, 1)]})
    assert alone == ["", "", "", "", "", "a4"]  # the window of 50 ms
    full = sizes("dynamic", {0: [request(n, 4, 1) for n in "ab"]}, max_num_seqs=2)
    assert full == ["a4 b4"]


def test_continuous_batching_computes_prompts_before_decodes():
    arrivals = {0: [request("a", 4, 4)], 1: [request("b", 4, 2)]}
    assert sizes("continuous", arrivals) == ["a4", "b4", "a1 b1", "a1", "a1"]


def test_chunked_batching_mixes_both():
    arrivals = {0: [request("a", 4, 4)], 1: [request("b", 20, 2)]}
    assert sizes("chunked", arrivals, max_num_batched_tokens=16) == [
        "a4",
        "a1 b15",
        "a1 b5",
        "a1 b1",
    ]
