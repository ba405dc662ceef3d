"""The watchdog on a clock of its own: what it calls an engine, when, and what it says and does."""

import logging
from dataclasses import dataclass, field

import msgspec
import pytest
from server.helpers import CONFIG, client_of

from octavo.core import EngineStats
from octavo.errors import EngineDeadError
from octavo.server.watchdog import MAX_GAP_S, RECOVERY_S, State, Watchdog
from octavo.testing.fake_engine import FakeEngine

TIMEOUT_S = 60.0


@dataclass
class ToldEngine(FakeEngine):
    """Its news is what a test says."""

    news: dict = field(default_factory=dict)

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats(), **self.news)


class Scene:
    """An engine, its watchdog, and time that passes in steps of a second."""

    def __init__(self, **options):
        self.now_s = 1000.0
        self.engine = ToldEngine()
        options = {"timeout_s": TIMEOUT_S, "exits": True} | options
        self.dog = Watchdog(self.engine, clock=lambda: self.now_s, **options)
        self.news(0, 0)

    def news(self, num_steps, num_tokens, **more):
        self.engine.news = {"num_steps": num_steps, "num_generation_tokens": num_tokens} | more

    def arrive(self, *names):
        for name in names:
            self.engine.live.add(name)
            self.engine.received[name] = [1], None

    def wait(self, seconds, *, steps_a_second=0, tokens_a_step=1):
        """Time passes; the engine may work meanwhile. Returns the states that were seen."""
        seen = []
        for _ in range(seconds):
            self.now_s += 1
            told = self.engine.news
            num_steps = told["num_steps"] + steps_a_second
            num_tokens = told["num_generation_tokens"] + steps_a_second * tokens_a_step
            self.engine.news = told | {
                "num_steps": num_steps,
                "num_generation_tokens": num_tokens,
            }
            seen.append(self.dog.look().state)
        return list(dict.fromkeys(seen))


def test_an_engine_that_works_or_rests_is_well():
    scene = Scene()
    assert scene.wait(200) == [State.OK]
    scene.arrive("a")
    assert scene.wait(200, steps_a_second=50) == [State.OK]
    scene.engine.live.clear()
    assert scene.wait(200) == [State.OK]


def test_a_step_that_takes_much_longer_than_the_others_is_slow_and_then_stuck(caplog):
    caplog.set_level(logging.INFO)
    scene = Scene(exits=False)
    scene.arrive(*(f"request-{i}" for i in range(10)))
    assert scene.wait(20, steps_a_second=50) == [State.OK]
    assert scene.wait(2) == [State.OK]
    assert scene.wait(57) == [State.SLOW]
    assert scene.wait(300) == [State.STUCK]
    assert scene.wait(1, steps_a_second=1) == [State.SLOW]  # it came back, but it took long
    assert scene.wait(20, steps_a_second=50) == [State.SLOW, State.OK]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4  # one line for each change
    slow, stuck, slow_again, well = told
    assert "slow: a step takes 3.0 s" in slow
    assert "no step finished for 60 s with 10 requests there: step 1001 hangs" in stuck
    assert "its process computes" in stuck
    assert "request-0, request-1, " in stuck and "request-7" in stuck
    assert "request-8" not in stuck  # eight are enough
    assert slow_again.startswith("the engine is slow")
    assert well.startswith("the engine is well again")


def test_what_is_usual_on_a_small_machine_is_not_slow_there():
    scene = Scene()
    scene.arrive("a")
    for _ in range(30):
        scene.wait(9)
        scene.wait(1, steps_a_second=1)
    assert scene.dog.condition.state is State.OK  # ten seconds a step are usual here
    assert scene.wait(79) == [State.OK]
    assert scene.wait(2) == [State.STUCK]


def test_steps_that_bring_nothing_to_those_who_wait_are_starvation(caplog):
    scene = Scene()
    scene.arrive("a", "b")
    scene.wait(10, steps_a_second=50)
    scene.engine.news |= {"num_running": 0, "num_waiting": 2, "waiting_by_reason": {"blocks": 2}}
    assert scene.wait(200, steps_a_second=1000, tokens_a_step=0) == [State.OK, State.STARVED]
    assert "2 wait (2 by blocks), with 998 of 1000 KV blocks free" in scene.dog.condition.why
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "requests: a, b" in record.getMessage()
    assert scene.wait(20, steps_a_second=50) == [State.STARVED, State.OK]


def test_a_better_state_must_last():
    scene = Scene()
    scene.arrive("a")
    scene.wait(10, steps_a_second=50)
    scene.wait(4)
    assert scene.dog.condition.state is State.SLOW
    assert scene.wait(int(RECOVERY_S) - 1, steps_a_second=50) == [State.SLOW]
    assert scene.wait(3, steps_a_second=50) == [State.OK]


def test_twice_its_time_and_a_stuck_engine_is_given_up():
    scene = Scene()
    scene.arrive("a")
    assert scene.wait(119) == [State.OK, State.SLOW, State.STUCK]
    assert scene.engine.abandoned == ""
    assert scene.wait(2) == [State.DEAD]
    assert "no step finished for 120 s with 1 requests there" in scene.engine.abandoned
    assert "--watchdog-timeout-s" in scene.engine.abandoned
    with pytest.raises(EngineDeadError, match="step 1 hangs"):
        scene.engine.check_health()


def test_whoever_only_wants_to_be_told_is_told():
    scene = Scene(exits=False)
    scene.arrive("a")
    scene.wait(1000)
    assert scene.dog.condition.state is State.STUCK and not scene.engine.abandoned


def test_a_step_that_computes_on_a_cpu_is_waited_for():
    scene = Scene()
    scene.arrive("a")
    for _ in range(600):
        scene.engine.script.cpu_s += 0.9
        scene.wait(1)
    assert scene.dog.condition.state is State.STUCK and not scene.engine.abandoned
    scene.wait(121)  # now it does nothing any more
    assert scene.dog.condition.state is State.DEAD


def test_time_in_which_nobody_looked_does_not_count():
    """The front end was stopped, or the machine slept."""
    scene = Scene()
    scene.arrive("a")
    scene.wait(5, steps_a_second=50)
    scene.now_s += 3600
    assert scene.dog.look().state in (State.OK, State.SLOW)
    assert scene.wait(int(TIMEOUT_S - MAX_GAP_S) - 1) == [State.SLOW]


def test_who_arrives_after_a_long_rest_does_not_find_a_stuck_engine():
    scene = Scene()
    scene.wait(1000)
    scene.arrive("a")
    assert scene.wait(1) == [State.OK]


@pytest.fixture
def scene(monkeypatch):
    """A scene whose watchdog is that of the next application."""
    scene = Scene()
    monkeypatch.setattr("octavo.server.state.Watchdog", lambda engine, **options: scene.dog)
    return scene


PROBES = ("/health", "/v2/health/live", "/ready", "/v2/health/ready", "/v2/models/fake-model/ready")


async def test_probes_and_metric_follow_the_state(scene):
    async def asked():
        async with client_of(scene.engine) as client:
            codes = [(await client.get(path)).status_code for path in PROBES]
            metrics = (await client.get("/metrics")).text.splitlines()
            told = (await client.get("/ready")).json()
        shown = [line for line in metrics if line.startswith("octavo_engine_state{")]
        assert len(shown) == len(State)
        [state] = [line.split('"')[1] for line in shown if line.endswith(" 1.0")]
        return codes, state, told

    well, unready = [200] * 5, [200, 200, 503, 503, 503]
    codes, state, told = await asked()
    assert (codes, state, told) == (well, "ok", {"status": "ready", "state": "ok", "why": ""})
    scene.arrive("secret-request")
    scene.wait(10)
    codes, state, told = await asked()
    assert (codes, state) == (well, "slow")
    assert told["state"] == "slow" and "a step takes 10" in told["why"]
    scene.wait(60)
    codes, state, told = await asked()
    assert (codes, state) == (unready, "stuck")
    assert told["state"] == told["error"]["code"] == "stuck"
    assert "secret" not in str(told)
    scene.wait(60)
    codes, state, told = await asked()
    assert (codes, state) == ([503] * 5, "dead")
    assert told["error"]["code"] == "engine_dead"


async def test_draining_is_told_unless_it_is_worse(scene):
    from octavo.server import create_app

    app = create_app(scene.engine, CONFIG)
    state = app.state.octavo
    state.draining = True
    assert state.condition().state is State.DRAINING
    scene.arrive("a")
    scene.wait(70)
    assert state.condition().state is State.STUCK
