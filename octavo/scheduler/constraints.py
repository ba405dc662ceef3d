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

    def begin_step(self) -> None:
        """Forget what the last step used."""
        ...

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of these `num_tokens` may run now? 0 means: not in this step."""
        ...

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence runs this many tokens in this step."""
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

    def begin_step(self) -> None:
        self._num_left = self.max_num_batched_tokens

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return min(num_tokens, self._num_left)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_left -= num_tokens


class SequenceSlots:
    """At most so many sequences run at once: rows of the runner's persistent state."""

    name = "sequences"
    preempts = False

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs
        self._num_used = 0

    def begin_step(self) -> None:
        self._num_used = 0

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if self._num_used < self.max_num_seqs else 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_used += 1


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
        self._num_served = 0

    def begin_step(self) -> None:
        self._num_served = 0

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        missing = self._allocator.num_missing_blocks(sequence, sequence.num_tokens)
        reserve = self._num_served if sequence.status is SequenceStatus.WAITING else 0
        return num_tokens if missing + reserve <= self._allocator.num_free_blocks else 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_served += 1
