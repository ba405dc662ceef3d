"""Whatever limits a step, one small object each. Pure Python.

`schedule()` asks every constraint the same question and takes the smallest answer, so a new limit
(adapter slots, encoder budget, grammar readiness, a tenant's quota) is a new class here and
nothing else. The name of the constraint that gave the smallest answer is the reason why a request
waits.
"""

from abc import abstractmethod
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from octavo.core import WAITING, Grammars, Sequence
from octavo.kvcache import Allocator


class Constraint(Protocol):
    """One limit on a step: a subclass states its name, what it allows, and what it keeps count of.

    What a subclass leaves out is answered here: it counts nothing, and pushes nobody out.
    """

    name: str
    preempts: bool = False  # a running sequence bound by this limit may push a younger one out
    binds_running: bool = True  # False: asked, and told what runs, at admission only
    stands_aside: bool = False  # a waiting sequence bound by this lets those behind it pass

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        """Forget what the last step used; these run as this one begins."""
        return

    @abstractmethod
    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of these `num_tokens` may run now? 0 means: not in this step."""

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence runs this many tokens in this step. A waiting one is thereby admitted."""
        return

    def release(self, sequence: Sequence) -> None:
        """A running sequence that was given nothing yet in this step was pushed out."""
        return

    def ran_out(self, num_tokens: int) -> None:
        """A step of so many tokens found no memory to compute in."""
        return

    @abstractmethod
    def explain(self, sequence: Sequence) -> str:
        """The numbers behind a refusal, in a few words. Only asked for when they are news."""


def next_end(running: SequenceOf[Sequence]) -> str:
    """When somebody will surely be done: no later than the shortest answer left can last."""
    steps = min((s.max_num_tokens - len(s.token_ids) for s in running), default=0)
    return f"next free in at most {steps} steps" if steps else "nobody runs"


class TokenBudget(Constraint):
    """At most so many tokens go through the model in one step (chunked prefill, arXiv 2403.02310).

    It bounds the time between two tokens of every running request, and the size of activations:
    after a step that found no memory, the next may be half as large, and each one twice the last.
    """

    name = "tokens"

    def __init__(self, max_num_batched_tokens: int):
        self.max_num_batched_tokens = max_num_batched_tokens
        self._next_limit = self._limit = max_num_batched_tokens
        self._num_left = 0

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._num_left = self._limit = self._next_limit
        self._next_limit = min(2 * self._limit, self.max_num_batched_tokens)

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if num_tokens <= self._num_left else self._num_left

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_left -= num_tokens

    def ran_out(self, num_tokens: int) -> None:
        self._next_limit = max(1, num_tokens // 2)

    def explain(self, sequence: Sequence) -> str:
        return f"a step computes at most {self._limit} tokens"


class WholePrompt(Constraint):
    """A prompt runs whole or not at all, for its tokens see each other and nothing of it is kept.

    Behind the limits that may cut it: it takes what they left.
    """

    name = "whole prompt"

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if num_tokens == sequence.num_uncomputed_tokens else 0

    def explain(self, sequence: Sequence) -> str:
        return f"a step had no room for all {sequence.num_uncomputed_tokens} tokens"


class SequenceSlots(Constraint):
    """At most so many sequences run at once: rows of the runner's persistent state."""

    name = "sequences"
    binds_running = False

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs
        self._running: SequenceOf[Sequence] = ()
        self._num_running = 0

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._running = running
        self._num_running = len(running)

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if self._num_running < self.max_num_seqs else 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_running += 1

    def release(self, sequence: Sequence) -> None:
        self._num_running -= 1

    def explain(self, sequence: Sequence) -> str:
        return f"all {self.max_num_seqs} places are taken; {next_end(self._running)}"


class GrammarReadiness(Constraint):
    """The grammar of an answer's shape must have been compiled, which other threads do."""

    name = "grammar"
    binds_running = False
    stands_aside = True

    def __init__(self, grammars: Grammars):
        self._grammars = grammars

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        shape = sequence.request.sampling.structured_outputs
        return num_tokens if shape is None or self._grammars.is_ready(shape) else 0

    def explain(self, sequence: Sequence) -> str:
        return "the grammar of its answer's shape is being compiled"


class Blocks(Constraint):
    """The KV pool must hold all tokens that a sequence knows, or none of it runs.

    All or nothing: half a prompt in the pool helps nobody and starves the rest. A sequence that is
    to be admitted must also leave a block for each one that runs, which may need it within the
    next `block_size` steps: without that reserve, admission and preemption would chase each other.
    """

    name = "blocks"
    preempts = True

    def __init__(self, allocator: Allocator):
        self._allocator = allocator
        self._running: SequenceOf[Sequence] = ()
        self._num_running = 0

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._running = running
        self._num_running = len(running)

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        if self._fits(sequence, sequence.num_tokens):
            return num_tokens
        num_drafts = len(sequence.draft_ids)
        if num_drafts and self._fits(sequence, sequence.num_tokens - num_drafts):
            # Guesses are worth nobody's place.
            return min(num_tokens, sequence.num_uncomputed_tokens - num_drafts)
        return 0

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        self._num_running += sequence.status is WAITING

    def release(self, sequence: Sequence) -> None:
        self._num_running -= 1

    def explain(self, sequence: Sequence) -> str:
        needed = self._allocator.num_missing_blocks(sequence, sequence.num_tokens)
        free, kept = self._allocator.num_free_blocks, self._num_running * self._allocator.grows
        return (
            f"needed {needed}, free {free}, {kept} kept for running requests; "
            f"{next_end(self._running)}"
        )

    def _fits(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self._allocator.num_missing_blocks(sequence, num_tokens)
        is_new = sequence.status is WAITING
        reserve = self._num_running * self._allocator.grows if is_new else 0
        return missing + reserve <= self._allocator.num_free_blocks
