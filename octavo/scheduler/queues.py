"""Who is next: the order of the waiting queue, and who gives way. Pure Python, one class a policy.

A policy orders waiting sequences and names the running one to push out when memory runs dry. It
decides nothing about memory or budgets: those are constraints.
"""

import heapq
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from octavo.core import Sequence


class QueuePolicy(Protocol):
    """The waiting queue. Sole writer: the scheduler."""

    name: str

    def add(self, sequence: Sequence) -> None:
        """A new or preempted sequence waits."""
        ...

    def head(self) -> Sequence | None:
        """The sequence to admit next, or None where nobody waits. It stays in the queue."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """A waiting sequence was admitted, or is gone."""
        ...

    def served(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence was given tokens in this step."""
        ...

    def victim(self, running: list[Sequence]) -> Sequence:
        """The running sequence that gives way first; `running` is in order of admission."""
        ...

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence may push a running one out."""
        ...

    def tokens_ahead(self, sequence: Sequence) -> int:
        """Prompt tokens of those in the queue who would be served before this newcomer."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...


class FirstComeFirstServed:
    """In order of arrival; the youngest gives way, and comes back to its place in the order."""

    name = "fcfs"

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        queue = self._queue
        if not queue or queue[-1].arrival < sequence.arrival:
            queue.append(sequence)
            return
        # Who comes back is older than those who never ran: its place is near the front.
        index = next(i for i, other in enumerate(queue) if other.arrival > sequence.arrival)
        queue.insert(index, sequence)

    def head(self) -> Sequence | None:
        return self._queue[0] if self._queue else None

    def remove(self, sequence: Sequence) -> None:
        if self._queue[0] is sequence:
            self._queue.popleft()
        else:
            self._queue.remove(sequence)

    def served(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def victim(self, running: list[Sequence]) -> Sequence:
        return running[-1]

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        return False

    def tokens_ahead(self, sequence: Sequence) -> int:
        return sum(other.num_prompt_tokens for other in self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)


class _Ranked(ABC):
    """A queue by rank, lowest first; ties go by arrival. Base of the policies that rank.

    Removed sequences stay in the heap until they come to its top, so that removal is cheap.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], int, Sequence]] = []
        self._waiting: dict[str, int] = {}  # id -> the entry of its that counts
        self._entries = itertools.count()

    @abstractmethod
    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        """Lower is served first."""

    def add(self, sequence: Sequence) -> None:
        entry = next(self._entries)
        self._waiting[sequence.id] = entry
        heapq.heappush(self._heap, (self.rank(sequence), entry, sequence))

    def head(self) -> Sequence | None:
        while self._heap:
            _, entry, sequence = self._heap[0]
            if self._waiting.get(sequence.id) == entry:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        del self._waiting[sequence.id]

    def served(self, sequence: Sequence, num_tokens: int) -> None:
        return  # a rank does not change with service

    def victim(self, running: list[Sequence]) -> Sequence:
        # The last of the lowest rank: max() keeps the first of equals, so it looks from the end.
        return max(reversed(running), key=self.rank)

    def tokens_ahead(self, sequence: Sequence) -> int:
        rank = self.rank(sequence)
        return sum(other.num_prompt_tokens for other in self if self.rank(other) <= rank)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return (s for _, entry, s in sorted(self._heap) if self._waiting.get(s.id) == entry)


class Priority(_Ranked):
    """Lower `priority` first, as vLLM counts; it pushes out running ones of a higher number."""

    name = "priority"

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.request.options.priority, sequence.arrival_s)

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        return waiting.request.options.priority < running.request.options.priority


class EarliestDeadlineFirst(_Ranked):
    """The request whose deadline is nearest goes first; those without one come last."""

    name = "deadline"

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.deadline_s, sequence.arrival_s)

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        return False


class Fair:
    """Token-fair between tenants: the virtual token counter (VTC, arXiv 2401.00588, algorithm 2).

    Each tenant has a counter of the service it got: prompt tokens cost 1, generated tokens 2 (the
    paper's weights). The tenant with the lowest counter goes next; one that comes back after a
    pause is lifted to the lowest active counter, so that idling saves nothing up. Tenants that are
    never idle get within a constant of the same service, whatever they send.
    """

    name = "fair"
    PROMPT_COST = 1.0
    OUTPUT_COST = 2.0

    def __init__(self) -> None:
        self._queues: dict[str, FirstComeFirstServed] = {}
        self._counters: dict[str, float] = {}
        self._last_to_leave = ""
        self._num_waiting = 0

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.options.tenant
        queue = self._queues.setdefault(tenant, FirstComeFirstServed())
        if not queue and not sequence.goes_first:
            active = [self._counters[t] for t, q in self._queues.items() if q]
            floor = min(active, default=self._counters.get(self._last_to_leave, 0.0))
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
        queue.add(sequence)
        self._num_waiting += 1

    def head(self) -> Sequence | None:
        waiting = [tenant for tenant, queue in self._queues.items() if queue]
        if not waiting:
            return None
        return self._queues[min(waiting, key=lambda t: self._counters[t])].head()

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.options.tenant
        self._queues[tenant].remove(sequence)
        if not self._queues[tenant]:
            self._last_to_leave = tenant
        self._num_waiting -= 1

    def served(self, sequence: Sequence, num_tokens: int) -> None:
        prompt_left = max(0, sequence.num_prompt_tokens - sequence.num_computed_tokens)
        num_prompt = min(num_tokens, prompt_left)
        cost = self.PROMPT_COST * num_prompt + self.OUTPUT_COST * (num_tokens - num_prompt)
        tenant = sequence.request.options.tenant
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost

    def victim(self, running: list[Sequence]) -> Sequence:
        return max(
            reversed(running), key=lambda s: self._counters.get(s.request.options.tenant, 0.0)
        )

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        return False

    def tokens_ahead(self, sequence: Sequence) -> int:
        """Its tenant's own queue, and of every other tenant's as much as fairness gives that one.

        Counters that differ now are not looked at: they even out within the queue.
        """
        own = self._queues.get(sequence.request.options.tenant)
        num_own = sequence.num_prompt_tokens + (0 if own is None else own.tokens_ahead(sequence))
        others = [
            queue.tokens_ahead(sequence) for queue in self._queues.values() if queue is not own
        ]
        return num_own - sequence.num_prompt_tokens + sum(min(n, num_own) for n in others)

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(self._queues.values())


POLICIES: dict[str, type[QueuePolicy]] = {
    policy.name: policy for policy in (FirstComeFirstServed, Priority, Fair, EarliestDeadlineFirst)
}


def create_queue(policy: str) -> QueuePolicy:
    """The waiting queue of a policy: fcfs, priority, fair or deadline."""
    return POLICIES[policy]()
