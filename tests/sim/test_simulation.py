"""The simulator itself: time, faults and disturbances do what they say, and lies are noticed."""

import pytest

from octavo.core import FinishReason, Request, RequestEvent, SamplingParams
from octavo.errors import IntegrityError
from octavo.sim import (
    Arrive,
    CancelEverybody,
    Drain,
    EngineSetup,
    Fault,
    Faults,
    History,
    Injection,
    JumpWallClock,
    Pause,
    SimulatedEngine,
    Squeeze,
    VirtualClock,
    oracle_tokens,
)
from octavo.sim.swarm import quiet_engine

PROMPT = list(range(1, 11))


def request(request_id="a", max_tokens=4, **options):
    return Request(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        **options,
    )


def simulate(*actions, faults=None, **setup):
    engine = SimulatedEngine(EngineSetup(block_size=4, **setup), faults=faults)
    engine.run(actions)
    return engine


def test_time_passes_by_the_work_that_is_done():
    engine = simulate(Arrive(at_s=1.0, request=request()))
    (client,) = engine.history.clients
    assert client.accepted_at_s == 1.0
    # One step for the prompt and three for a token each.
    work_s = 4 * engine.executor.BASE_S + 13 * engine.executor.SECONDS_PER_TOKEN
    assert client.ended_at_s == pytest.approx(1.0 + work_s)


def test_a_slow_step_takes_longer_and_changes_nothing_else():
    def ended_at_s(**options):
        (client,) = simulate(Arrive(at_s=0.0, request=request()), **options).history.clients
        assert client.end is FinishReason.LENGTH
        return client.ended_at_s

    assert ended_at_s(faults=Faults(at_steps={2: Fault.SLOW})) > 5 * ended_at_s()


def test_the_wall_clock_may_jump_and_the_engine_does_not_notice():
    plain = simulate(Arrive(at_s=0.0, request=request()))
    jumped = simulate(Arrive(at_s=0.0, request=request()), JumpWallClock(at_s=0.015, seconds=-1e9))
    assert jumped.clock.wall() < plain.clock.wall() - 1e8
    ends = [engine.history.clients[0].ended_at_s for engine in (plain, jumped)]
    assert ends[0] == ends[1]


def test_time_itself_never_goes_back():
    with pytest.raises(ValueError, match="cannot go back"):
        VirtualClock().advance(-1.0)


def test_a_pause_delays_and_loses_nothing():
    engine = simulate(Arrive(at_s=0.0, request=request()), Pause(at_s=0.01, seconds=100.0))
    (client,) = engine.history.clients
    assert client.end is FinishReason.LENGTH and client.ended_at_s > 100.0


def test_hidden_blocks_push_requests_out_and_they_come_back():
    engine = simulate(
        *(Arrive(at_s=0.0, request=request(i, max_tokens=30)) for i in "abc"),
        Squeeze(at_s=0.05, num_blocks=64),
        Squeeze(at_s=0.5, num_blocks=0),
    )
    assert engine.core.stats().num_preemptions > 0
    assert [c.end for c in engine.history.clients] == [FinishReason.LENGTH] * 3


def test_a_drain_admits_nobody_and_finishes_everybody():
    engine = simulate(
        Arrive(at_s=0.0, request=request("in", max_tokens=20)),
        Drain(at_s=0.02),
        Arrive(at_s=0.03, request=request("late")),
    )
    assert [c.request.request_id for c in engine.history.clients] == ["in"]
    assert engine.history.clients[0].end is FinishReason.LENGTH
    assert engine.history.num_refused == 1


def test_a_storm_ends_everybody_at_once():
    engine = simulate(
        *(Arrive(at_s=0.0, request=request(i, max_tokens=30)) for i in "abcd"),
        CancelEverybody(at_s=0.05),
        max_num_seqs=2,
    )
    assert [c.end for c in engine.history.clients] == [FinishReason.ABORT] * 4


def test_two_failures_in_a_row_end_every_stream_with_an_error():
    with quiet_engine():
        engine = simulate(
            Arrive(at_s=0.0, request=request("a")),
            Arrive(at_s=0.025, request=request("b")),
            Arrive(at_s=0.025, request=request("c")),
            faults=Faults(at_steps={2: Fault.FAIL_AFTER, 3: Fault.OUT_OF_MEMORY}, lethal_rate=1.0),
            max_num_seqs=1,
        )
    assert engine.history.engine_died
    assert [c.error for c in engine.history.clients][1:] == ["the engine is gone"] * 2


def history_of(*, max_tokens=4):
    history = History(vocab_size=1000, block_size=4)
    client = history.accept(request(max_tokens=max_tokens), max_tokens, at_s=0.0, step=0)
    return history, client


TOKENS = oracle_tokens(PROMPT, 4, 1000)


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (RequestEvent("nobody", (1,)), "nobody waits for"),
        (RequestEvent("a", (TOKENS[0] + 1,)), "got token"),
        (RequestEvent("a", (TOKENS[1],)), "got token"),
        (RequestEvent("a", (TOKENS[0],), finish_reason=FinishReason.LENGTH), "but None is true"),
        (RequestEvent("a", (TOKENS[0],), finish_reason=FinishReason.STOP), "but None is true"),
        (RequestEvent("a", tuple(TOKENS)), "but length is true"),
        (RequestEvent("a", finish_reason=FinishReason.ABORT), "did not go away"),
        (RequestEvent("a", finish_reason=FinishReason.ERROR, error="no"), "no fault struck"),
        (RequestEvent("a", (TOKENS[0],), error="no"), "and error 'no'"),
        (RequestEvent("a", (TOKENS[0],), num_cached_tokens=3), "found 3 tokens cached"),
        (RequestEvent("a", (TOKENS[0],), num_cached_tokens=12), "found 12 tokens cached"),
        (RequestEvent("a", (TOKENS[0],), num_cached_tokens=4), "nobody with its salt"),
    ],
)
def test_a_history_believes_no_lie(event, complaint):
    history, _ = history_of()
    with pytest.raises(IntegrityError, match=complaint):
        history.note(event, at_s=0.0, step=1)


def test_nothing_may_come_after_the_end():
    history, client = history_of(max_tokens=1)
    end = RequestEvent("a", (TOKENS[0],), finish_reason=FinishReason.LENGTH)
    history.note(end, at_s=0.0, step=1)
    assert client.end is FinishReason.LENGTH
    with pytest.raises(IntegrityError, match="nobody waits for"):
        history.note(end, at_s=0.0, step=1)


def test_an_end_after_its_due_step_is_starvation():
    history, client = history_of(max_tokens=1)
    client.due_step = 3
    end = RequestEvent("a", (TOKENS[0],), finish_reason=FinishReason.LENGTH)
    with pytest.raises(IntegrityError, match="must by 3"):
        history.note(end, at_s=0.0, step=4)


def test_an_error_is_fine_where_a_fault_struck_and_an_abort_where_the_client_left():
    history, client = history_of()
    history.touch(Injection(1, Fault.NOT_FINITE, ("a", "nobody")))
    history.note(RequestEvent("a", finish_reason=FinishReason.ERROR, error="no"), at_s=0.0, step=1)
    assert client.error == "no"
    history, client = history_of()
    history.cancel(["a", "nobody"])
    history.note(RequestEvent("a", finish_reason=FinishReason.ABORT), at_s=0.0, step=1)
    assert client.end is FinishReason.ABORT


def test_the_same_beginning_under_the_same_salt_explains_cached_tokens():
    history, _ = history_of()
    history.accept(request("b"), 4, at_s=0.0, step=0)
    history.note(RequestEvent("b", (TOKENS[0],), num_cached_tokens=8), at_s=0.0, step=1)
