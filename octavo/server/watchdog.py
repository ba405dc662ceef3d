"""Tells a slow engine from a starved one and from a stuck one. Knows no HTTP.

    ok        steps finish, and tokens come of them; or there is nothing to do
    slow      a step takes much longer than recent ones did
    starved   steps finish, requests are there, and no token comes of any step
    stuck     requests are there, and no step finished for the watchdog's time
    dead      nothing will come any more

It looks from outside, at the engine's last news and at the requests that have no end yet: a call
that never returns and a process that somebody stopped look the same from there. Loading is none of
its business: nobody can ask anything then.
"""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from octavo.core import EngineStats
from octavo.engine import Pulse, ServingEngine
from octavo.errors import EngineDeadError

logger = logging.getLogger(__name__)

SLOW_STEP_S = 2.0  # no step below this is slow
SLOW_FACTOR = 8  # times the median of recent steps
STARVED_S = 5.0
COMPUTES = 0.5  # CPU seconds a second: a process that uses more is at work, if it works on CPUs
RECOVERY_S = 5.0  # a better state must last so long to be believed, or the log would flicker
MAX_GAP_S = 5.0
MAX_NAMED_REQUESTS = 8


class State(StrEnum):
    """How it stands with an engine, or with the server before it."""

    OK = "ok"
    SLOW = "slow"
    STARVED = "starved"
    STUCK = "stuck"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Condition:
    """A state, and why. `why` names no request: whoever may ask for readiness may read it."""

    state: State
    why: str = ""


class Watchdog:
    """Sole writer of its condition. `look` at least every few seconds, or it sees nothing.

    Time that passes between two looks counts for `MAX_GAP_S` at most: a front end that was stopped
    itself, or slept with the whole machine, must not accuse the engine.

    exits: whether an engine that is stuck for twice its time is given up. One that computes on CPUs
        is not: on a small machine a large step may take minutes, and after a restart, as many.
    """

    def __init__(
        self,
        engine: ServingEngine,
        *,
        timeout_s: float,
        exits: bool,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.condition = Condition(State.OK)
        self._engine = engine
        self._timeout_s = timeout_s
        self._exits = exits
        self._clock = clock
        self._last_look_s = clock()
        self._seen_s = 0.0  # all times below are of this clock, which runs while somebody looks
        self._last_step_s = 0.0
        self._last_token_s = 0.0
        self._last_bad_s = 0.0
        self._num_steps = 0
        self._num_tokens = 0
        self._pulse = Pulse("")  # of an engine that is stuck
        self._pulse_s = 0.0
        self._step_times_s: deque[float] = deque(maxlen=120)  # means between looks

    def look(self) -> Condition:
        """Judge the engine now; a change is logged, once."""
        now_s = self._clock()
        self._seen_s += min(now_s - self._last_look_s, MAX_GAP_S)
        self._last_look_s = now_s
        found = self._judge()
        before = self.condition
        if found.state is not State.OK:
            self._last_bad_s = self._seen_s
        elif (
            before.state in (State.SLOW, State.STARVED)
            and self._engine.is_busy
            and self._seen_s - self._last_bad_s < RECOVERY_S
        ):
            return before
        self.condition = found
        if found.state not in (before.state, State.DEAD):  # of its death, whoever ends it tells
            self._log(before.state)
        return found

    def _judge(self) -> Condition:
        try:
            self._engine.check_health()
        except EngineDeadError as error:
            return Condition(State.DEAD, str(error))
        stats = self._engine.stats()
        self._note(stats)
        quiet_s = self._seen_s - self._last_step_s
        if quiet_s >= self._patience_s:
            return self._stuck(quiet_s)
        starved_s = self._last_step_s - self._last_token_s
        if starved_s >= min(STARVED_S, self._timeout_s):
            return Condition(State.STARVED, _starved(stats, starved_s))
        longest_s = max(quiet_s, self._step_times_s[-1] if self._step_times_s else 0.0)
        if longest_s > self._slow_step_s and self._engine.is_busy:
            why = f"a step takes {longest_s:.1f} s; that is slow above {self._slow_step_s:.1f} s"
            return Condition(State.SLOW, why)
        return Condition(State.OK)

    def _note(self, stats: EngineStats) -> None:
        """Take the time of what has happened since the last look."""
        num_tokens = stats.num_prompt_tokens + stats.num_generation_tokens
        if not self._engine.is_busy:
            self._last_step_s = self._last_token_s = self._seen_s
        elif stats.num_steps != self._num_steps:
            num_new = max(1, stats.num_steps - self._num_steps)
            self._step_times_s.append((self._seen_s - self._last_step_s) / num_new)
            self._last_step_s = self._seen_s
            if num_tokens != self._num_tokens:
                self._last_token_s = self._seen_s
        self._num_steps, self._num_tokens = stats.num_steps, num_tokens

    @property
    def _slow_step_s(self) -> float:
        return max(SLOW_STEP_S, SLOW_FACTOR * self._usual_step_s)

    @property
    def _usual_step_s(self) -> float:
        return statistics.median(self._step_times_s) if self._step_times_s else 0.0

    @property
    def _patience_s(self) -> float:
        """For a step, until the engine counts as stuck, and as long again until it is given up."""
        return max(self._timeout_s, SLOW_FACTOR * self._usual_step_s)

    def _stuck(self, quiet_s: float) -> Condition:
        num_live = len(self._engine.live)
        why = (
            f"no step finished for {quiet_s:.0f} s with {num_live} requests there: step "
            f"{self._num_steps + 1} hangs"
        )
        if self.condition.state is not State.STUCK:
            self._pulse, self._pulse_s = self._engine.examine(), self._seen_s
        elif self._exits and self._seen_s - self._pulse_s >= self._patience_s:
            before, before_s = self._pulse, self._pulse_s
            self._pulse, self._pulse_s = self._engine.examine(), self._seen_s
            if self._pulse.cpu_s - before.cpu_s < COMPUTES * (self._pulse_s - before_s):
                reason = (
                    f"{why}, and its process {self._pulse.doing}; steps that may take longer need "
                    "a higher --watchdog-timeout-s"
                )
                self._engine.abandon(reason)
                return Condition(State.DEAD, reason)
        return Condition(State.STUCK, why)

    def _log(self, before: State) -> None:
        state, why = self.condition.state, self.condition.why
        extra = {"state": state.value}
        if state is State.OK:
            logger.info("the engine is well again, after it was %s", before, extra=extra)
            return
        level = logging.WARNING if state in (State.SLOW, State.STARVED) else logging.ERROR
        facts = [why]
        if state is State.STUCK:
            facts.append(f"its process {self._pulse.doing}")
        if self._engine.live:
            named = ", ".join(sorted(self._engine.live)[:MAX_NAMED_REQUESTS])
            facts.append(f"requests: {named}")
        logger.log(level, "the engine is %s: %s", state, "; ".join(facts), extra=extra)


def _starved(stats: EngineStats, seconds: float) -> str:
    reasons = ", ".join(f"{count} by {name}" for name, count in stats.waiting_by_reason.items())
    return (
        f"no step brought a token for {seconds:.0f} s; {stats.num_running} requests run and "
        f"{stats.num_waiting} wait ({reasons or 'no reason known'}), with "
        f"{stats.num_free_blocks} of {stats.num_blocks} KV blocks free"
    )
