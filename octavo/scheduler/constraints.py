"""Whatever limits a step, one small object each. Pure Python.

`schedule()` asks every constraint the same question and takes the smallest answer, so a new limit
(adapter slots, encoder budget, grammar readiness, a tenant's quota) is a new class here and
nothing else. The name of the constraint that gave the smallest answer is the reason why a request
waits.
"""

from typing import Protocol

from octavo.core import Sequence, SequenceStatus
from octavo.kvcache import Allocator


class Constraint(Protocol):
    """One limit on a step."""

    name: str
    preempts: bool  # a running sequence bound by this limit may push a younger one out

    def begin_step(self, num_running: int) -> None:
        """Forget what the last step used; so many sequences run as this one begins."""
        ...

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of these `num_tokens` may run now? 0 means: not in this step."""
        ...

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence runs this many tokens in this step. A waiting one is thereby admitted."""
        ...

    def release(self, sequence: Sequence) -> None:
        """A running sequence that was given nothing yet in this step was pushed out."""
        ...

    def explain(self, sequence: Sequence) -> tuple[object, ...]:
        """The numbers behind a refusal: a format string and what goes into it."""
        ...


class TokenBudget:
    """At most so many tokens go through the model in one step (chunked prefill, arXiv 2403.02310).

    It bounds the time between two tokens of every running request, and the size of activations.
    """

    name = "tokens"
    preempts = False

    def __init__(self, max_num_batched_tokens: int):
        self.max_num_batched_tokens = max_num_batched_tokens
        self._num_left = 0

    def begin_step(self, num_running: int) -> None:
        self._num_left = self.max_num_batched_tokens

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return min(num_tokens, self._num_left)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_left -= num_tokens

    def release(self, sequence: Sequence) -> None:
        pass

    def explain(self, sequence: Sequence) -> tuple[object, ...]:
        return ("a step computes at most {} tokens", self.max_num_batched_tokens)


class SequenceSlots:
    """At most so many sequences run at once: rows of the runner's persistent state."""

    name = "sequences"
    preempts = False

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs
        self._num_running = 0

    def begin_step(self, num_running: int) -> None:
        self._num_running = num_running

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        has_place = sequence.status is SequenceStatus.RUNNING
        return num_tokens if has_place or self._num_running < self.max_num_seqs else 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_running += sequence.status is SequenceStatus.WAITING

    def release(self, sequence: Sequence) -> None:
        self._num_running -= 1

    def explain(self, sequence: Sequence) -> tuple[object, ...]:
        return ("all {} places are taken", self.max_num_seqs)


class Blocks:
    """The KV pool must hold all tokens that a sequence knows, or none of it runs.

    All or nothing: half a prompt in the pool helps nobody and starves the rest. A sequence that is
    to be admitted must also leave a block for each one that runs, which may need it within the
    next `block_size` steps: without that reserve, admission and preemption would chase each other.
    """

    name = "blocks"
    preempts = True

    def __init__(self, allocator: Allocator):
        self._allocator = allocator
        self._num_running = 0

    def begin_step(self, num_running: int) -> None:
        self._num_running = num_running

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        missing = self._allocator.num_missing_blocks(sequence, sequence.num_tokens)
        reserve = self._num_running if sequence.status is SequenceStatus.WAITING else 0
        return num_tokens if missing + reserve <= self._allocator.num_free_blocks else 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_running += sequence.status is SequenceStatus.WAITING

    def release(self, sequence: Sequence) -> None:
        self._num_running -= 1

    def explain(self, sequence: Sequence) -> tuple[object, ...]:
        needed = self._allocator.num_missing_blocks(sequence, sequence.num_tokens)
        free = self._allocator.num_free_blocks
        return ("needed {}, free {}, {} kept for running requests", needed, free, self._num_running)
