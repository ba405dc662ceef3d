"""Which LoRA adapters may run together. Pure Python: names only.

Where an adapter's matrices lie is the runner's affair; here it only counts that those of all
running sequences have room on the device together.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from octavo.core import WAITING, Sequence
from octavo.scheduler.constraints import Constraint

PATIENCE_STEPS = 200  # that one may be passed by others, before nobody new may hold its place


class AdapterSlots(Constraint):
    """The sequences that run have at most `max_loras` adapters among them.

    Who finds no slot lets others pass, whose adapter is there or who need none. So that a stream of
    them cannot keep it out for ever, those who came later wait with it after a while, but for those
    without an adapter: then slots fall free.
    """

    name = "adapter slots"
    binds_running = False
    stands_aside = True

    def __init__(self, max_loras: int):
        self.max_loras = max_loras
        self._running: Counter[str] = Counter()  # sequences, by adapter
        self._passed: Sequence | None = None  # the one that waits longest for a slot
        self._num_refusals = 0  # of its own, about one a step

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._running = Counter(filter(None, map(adapter_of, running)))
        if self._passed is not None and self._passed.status is not WAITING:
            self._passed = None

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        adapter = adapter_of(sequence)
        if adapter is None:
            return num_tokens
        if self._must_wait_for_another(sequence):
            return 0
        if adapter in self._running or len(self._running) < self.max_loras:
            return num_tokens
        if self._passed is None or sequence.arrival < self._passed.arrival:
            self._passed, self._num_refusals = sequence, 0
        self._num_refusals += self._passed is sequence
        return 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        adapter = adapter_of(sequence)
        if adapter is not None and sequence.status is WAITING:
            self._running[adapter] += 1

    def release(self, sequence: Sequence) -> None:
        adapter = adapter_of(sequence)
        if adapter is not None:
            self._running[adapter] -= 1
            self._running = +self._running

    def explain(self, sequence: Sequence) -> str:
        if self._must_wait_for_another(sequence):
            return "a request that came before has waited long for a slot"
        return f"a step holds at most {self.max_loras} adapters, and as many others run"

    def _must_wait_for_another(self, sequence: Sequence) -> bool:
        first = self._passed
        if first is None or self._num_refusals < PATIENCE_STEPS:
            return False
        return sequence.arrival > first.arrival and adapter_of(sequence) != adapter_of(first)


def adapter_of(sequence: Sequence) -> str | None:
    """The digest of a sequence's adapter, or None."""
    adapter = sequence.request.options.adapter
    return None if adapter is None else adapter.digest


def adapters_of(
    constraints: Iterable[Constraint],
    running: Iterable[Sequence],
    waiting: Iterable[Sequence],
) -> tuple[dict[str, tuple[int, int]], int]:
    """((running, waiting) requests by adapter's name, most adapters in a step); empty without."""
    limits = [one.max_loras for one in constraints if isinstance(one, AdapterSlots)]
    if not limits:
        return {}, 0
    counts = [
        Counter(s.request.options.adapter.name for s in group if s.request.options.adapter)
        for group in (running, waiting)
    ]
    names = sorted(counts[0] | counts[1])
    return {name: (counts[0][name], counts[1][name]) for name in names}, limits[0]
