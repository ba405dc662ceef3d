"""Everybody who waits: for a place, in the policy's order, or held back for a result."""

from collections.abc import Iterable, Iterator

from octavo.core import Sequence, SequenceStatus
from octavo.errors import IntegrityError
from octavo.scheduler.queues import QueuePolicy


class WaitingRoom:
    """The policy's queue, and those whom the policy must not see yet. Sole writer: the scheduler.

    Held are siblings whose prompt another one computes, and sequences that were pushed out while
    the result of their last step was on its way: nobody knows yet what they would run.
    """

    def __init__(self, policy: QueuePolicy):
        self.policy = policy
        self.num_queued_tokens = 0  # prompt tokens of those in the policy's queue
        self._held: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self.policy) + len(self._held)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.policy
        yield from self._held.values()

    def add(self, sequence: Sequence) -> None:
        """It waits for a place."""
        self.policy.add(sequence)
        self.num_queued_tokens += sequence.num_prompt_tokens

    def hold(self, sequence: Sequence) -> None:
        """It waits for something else first."""
        self._held[sequence.id] = sequence

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Those of them who were held wait for a place now."""
        for sequence in sequences:
            if self._held.pop(sequence.id, None) is not None:
                self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It was admitted, or is gone."""
        if self._held.pop(sequence.id, None) is None:
            self.policy.remove(sequence)
            self.num_queued_tokens -= sequence.num_prompt_tokens

    def check_integrity(self) -> None:
        """Recount; raise `IntegrityError` on any difference."""
        for sequence in self:
            if sequence.status is not SequenceStatus.WAITING or sequence.block_ids:
                raise IntegrityError(f"{sequence.id} waits but is not in a waiting state")
        if sum(s.num_prompt_tokens for s in self.policy) != self.num_queued_tokens:
            raise IntegrityError("the count of queued prompt tokens is wrong")
