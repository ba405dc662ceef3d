"""What becomes of the KV of a sequence that is pushed out. Pure Python.

recompute  it is dropped, and computed again when there is room
swap       it is copied to host memory and back (vLLM's first engine did so, arXiv 2309.06180, 4.5)
auto       whichever costs less for this sequence, by what was measured
"""

from octavo.core import Sequence
from octavo.kvcache import Allocator
from octavo.scheduler.admission import PrefillSpeed

PREEMPTION_MODES = ("recompute", "swap", "auto")


class TransferSpeed:
    """Seconds that a KV block takes between device and host, lately. Sole writer: the scheduler."""

    SMOOTHING = 0.2  # weight of the newest step, as for the prefill speed

    def __init__(self, block_s: float | None = None):
        self.block_s = block_s

    def note(self, num_blocks: int, seconds: float) -> None:
        """So many blocks were copied in so many seconds."""
        if num_blocks and seconds > 0:
            newest = seconds / num_blocks
            before = newest if self.block_s is None else self.block_s
            self.block_s = before + self.SMOOTHING * (newest - before)


class Preemption:
    """Chooses between recomputing and swapping, and does it.

    The cost model counts the device's time: each block of a swapped sequence is copied out and in
    again; each token of a dropped one goes through the model again. Where a speed is not known yet,
    it swaps, which is how that of copying becomes known.
    """

    def __init__(
        self,
        mode: str = "recompute",
        *,
        transfers: TransferSpeed | None = None,
        prefills: PrefillSpeed | None = None,
    ):
        self.transfers = transfers or TransferSpeed()
        self._mode = mode
        self._prefills = prefills or PrefillSpeed()

    def give_up(self, sequence: Sequence, allocator: Allocator) -> str:
        """Take all blocks from a sequence; return in a few words what became of their content."""
        if self._swaps(sequence) and allocator.swap_out(sequence):
            return "its KV waits in host memory"
        allocator.free(sequence)
        return "computed again later"

    def _swaps(self, sequence: Sequence) -> bool:
        if not sequence.num_reusable_tokens:
            return False  # its hidden states are needed again, all of them
        if self._mode != "auto":
            return self._mode == "swap"
        block_s, tokens_per_s = self.transfers.block_s, self._prefills.tokens_per_s
        if block_s is None or tokens_per_s is None:
            return True
        swap_s = 2 * len(sequence.block_ids) * block_s
        return swap_s < sequence.num_computed_tokens / tokens_per_s
