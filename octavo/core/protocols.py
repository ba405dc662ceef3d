"""The two seams that let the same engine loop serve, simulate and be tested."""

import time
from collections.abc import Callable
from typing import Protocol

from octavo.core.events import SleepReport
from octavo.core.plan import StepPlan, StepResult


class Clock(Protocol):
    """Where time comes from. Monotonic seconds; the zero is arbitrary."""

    def now(self) -> float: ...


class Executor(Protocol):
    """Whatever turns a plan into sampled tokens: a model on a device, or a fake."""

    def execute(self, plan: StepPlan) -> StepResult: ...


class Sleeper(Protocol):
    """Holds the model of an executor: gives its memory up and back, and tells what it counted."""

    def sleep(self, level: int) -> SleepReport: ...

    def wake_up(self) -> None: ...

    def expert_tokens(self) -> dict[str, list[int]]: ...


class CacheFile(Protocol):
    """Cached content that outlives the process."""

    def empty(self) -> None: ...


class PendingResult(Protocol):
    """A step that was begun. `result` waits for its end, and raises what went wrong."""

    def result(self) -> StepResult: ...


Launch = Callable[[StepPlan], PendingResult]


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
