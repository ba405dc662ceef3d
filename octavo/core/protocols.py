"""The two seams that let the same engine loop serve, simulate and be tested."""

import time
from collections.abc import Callable
from typing import Protocol

from octavo.core.plan import StepPlan, StepResult


class Clock(Protocol):
    """Where time comes from. Monotonic seconds; the zero is arbitrary."""

    def now(self) -> float: ...


class Executor(Protocol):
    """Whatever turns a plan into sampled tokens: a model on a device, or a fake."""

    def execute(self, plan: StepPlan) -> StepResult: ...


class PendingResult(Protocol):
    """A step that was begun. `result` waits for its end, and raises what went wrong."""

    def result(self) -> StepResult: ...


Launch = Callable[[StepPlan], PendingResult]


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
