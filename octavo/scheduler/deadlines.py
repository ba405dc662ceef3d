"""Who has not begun when the first token was due. Pure Python.

A queue may be full of requests whose clients do not want the answer any more. They are found by
their deadlines, nearest first, so that a step looks at one of them and not at the whole queue.
"""

import heapq
import math

from octavo.core import WAITING, Sequence

_MIN_TO_SWEEP = 64  # entries


class Deadlines:
    """The deadlines of those who wait for their first step. Sole writer: the scheduler.

    Who has begun or ended stays in the heap until its time comes, or until the heap has doubled: it
    is swept then, so it holds at most twice as many as wait.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._sweep_at = _MIN_TO_SWEEP

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        """It has come, and wants its first token in time, or whenever."""
        if sequence.deadline_s == math.inf:
            return
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if not _has_begun(entry[2])]
            heapq.heapify(self._heap)
            self._sweep_at = max(_MIN_TO_SWEEP, 2 * len(self._heap))
        heapq.heappush(self._heap, (sequence.deadline_s, sequence.arrival, sequence))

    def passed(self, now_s: float) -> list[str]:
        """The ids of those who have not begun by now, though their time is over; told once."""
        overdue = []
        while self._heap and self._heap[0][0] < now_s:
            *_, sequence = heapq.heappop(self._heap)
            if not _has_begun(sequence):
                overdue.append(sequence.id)
        return overdue


def _has_begun(sequence: Sequence) -> bool:
    """Whether something of it, or of the prompt that it shares, was in a step, or it has ended."""
    first = sequence if sequence.fork is None else sequence.fork.parent
    return sequence.status is not WAITING or first.first_scheduled_s < math.inf
