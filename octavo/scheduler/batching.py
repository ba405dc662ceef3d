"""The ladder of batching: four ways to fill a step, each short enough to compare. Pure Python.

static      a batch runs until its last member is done; nobody joins
dynamic     the same, but it waits a moment so that more can join
continuous  anybody joins at any step, and prompts go first (Orca, OSDI 22)
chunked     decodes go first, and prompts fill what is left in pieces (Sarathi, arXiv 2403.02310)
"""

from typing import Protocol

from octavo.core import Clock
from octavo.scheduler.step import StepBuilder


class Batching(Protocol):
    """In which order the sequences of a step are served."""

    name: str

    def fill(self, step: StepBuilder) -> None:
        """Plan one step."""
        ...


class Static:
    """Request-level batching: what serving was before iteration-level scheduling.

    A batch forms while nobody runs, over as many steps as its prompts need; then the door is shut
    until the last of its members has finished. All prompts are computed before the first decode.
    """

    name = "static"

    def __init__(self) -> None:
        self._door_is_open = False

    def fill(self, step: StepBuilder) -> None:
        if not step.running and self.may_form(step):
            self._door_is_open = True
        step.serve_running(prefills_only=True)
        if self._door_is_open:
            step.admit_waiting()
            # Only the token budget lets a batch go on forming; it is full by any other limit.
            self._door_is_open = step.stopped_by == "tokens" and not step.preempted
        if not step.scheduled:
            step.serve_running()

    def may_form(self, step: StepBuilder) -> bool:
        """Whether a new batch may begin to form in this step."""
        return True


class Dynamic(Static):
    """Static, but a batch forms only when it would be full or its first member waited long enough.

    The window trades the first request's latency for fuller batches (as in Triton's batcher).
    """

    name = "dynamic"

    def __init__(self, clock: Clock, *, window_s: float, max_num_seqs: int):
        super().__init__()
        self._clock = clock
        self._window_s = window_s
        self._max_num_seqs = max_num_seqs

    def may_form(self, step: StepBuilder) -> bool:
        head = step.waiting.head()
        if head is None:
            return False
        is_full = len(step.waiting) >= self._max_num_seqs
        return is_full or self._clock.now() - head.arrival_s >= self._window_s


class Continuous:
    """Iteration-level batching with prompts first: a step computes prompts, or decodes, never both.

    Throughput is high, but every arriving prompt makes all running requests wait for it.
    """

    name = "continuous"

    def fill(self, step: StepBuilder) -> None:
        step.admit_urgent()
        step.serve_running(prefills_only=True)
        step.admit_waiting()
        if not step.scheduled:
            step.serve_running()


class Chunked:
    """Decodes first, then prompts in what the token budget leaves: steps stay short and even."""

    name = "chunked"

    def fill(self, step: StepBuilder) -> None:
        step.admit_urgent()
        step.serve_running()
        if not step.preempted:
            step.admit_waiting()


BATCHINGS = (Static.name, Dynamic.name, Continuous.name, Chunked.name)


def create_batching(
    name: str, clock: Clock, *, max_num_seqs: int, window_s: float = 0.05
) -> Batching:
    """A rung of the ladder by its name."""
    if name == Dynamic.name:
        return Dynamic(clock, window_s=window_s, max_num_seqs=max_num_seqs)
    rungs: dict[str, type[Static | Continuous | Chunked]] = {
        kind.name: kind for kind in (Static, Continuous, Chunked)
    }
    return rungs[name]()
