"""KV memory before paging: every sequence gets one run of consecutive blocks, once and for all.

The kernels of that time needed a sequence's KV in one piece, so its memory was reserved at its
start for the longest that it could become (arXiv 2309.06180, section 3.1). A block table is then
simply consecutive ids, and the engine runs on it unchanged. Pure Python; knows no tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from octavo.core import Sequence
from octavo.errors import IntegrityError
from octavo.kvcache.allocator import check_slots
from octavo.kvcache.run_pools import BuddyPool, FirstFitPool, RunPool
from octavo.kvcache.unshared import Unshared


class RunAllocator(Unshared, ABC):
    """Reserves one run for each sequence. Sole writer of its pool; subclasses say how long.

    `grows` is 0: a running sequence never asks for more, so nothing need be kept for it.
    """

    grows = 0

    def __init__(self, pool: RunPool, block_size: int):
        self.num_blocks = pool.num_blocks
        self.block_size = block_size
        self._pool = pool

    @abstractmethod
    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence is given which may come to hold the KV of `num_tokens` tokens.

        More than `num_blocks` where no run of the pool could ever be so long.
        """

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Nothing, once the sequence has its run; else the run. More than is free: no run fits."""
        if sequence.block_ids:
            return 0
        needed = self._num_reserved_blocks(sequence)
        if max(self._pool.free_runs.values(), default=0) >= needed:
            return needed
        return max(needed, self.num_free_blocks + 1)

    def num_stranded_blocks(self, sequence: Sequence) -> int:
        """Free blocks that lie in runs too short for this sequence: external fragmentation."""
        needed = self._num_reserved_blocks(sequence)
        return sum(length for length in self._pool.free_runs.values() if length < needed)

    def start(self, sequence: Sequence) -> int:
        """An empty table: runs cannot be shared, so a fork computes all its tokens itself."""
        sequence.block_ids = []
        return 0

    def stop(self, sequence: Sequence) -> None:
        if sequence.block_ids:
            self._pool.give_back(sequence.block_ids[0])
        sequence.block_ids = []

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        """The whole run at the first call, and nothing more after it."""
        if sequence.block_ids:
            return len(sequence.block_ids)
        num_blocks = self._num_reserved_blocks(sequence)
        first = self._pool.take(num_blocks)
        sequence.block_ids = list(range(first, first + num_blocks))
        return 0

    def free(self, sequence: Sequence) -> None:
        self.stop(sequence)

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        live = list(live)
        check_slots(live, self.block_size)
        held: dict[int, int] = {}
        for sequence in live:
            table = sequence.block_ids
            if not table:
                continue
            if table != list(range(table[0], table[0] + len(table))):
                raise IntegrityError(f"the blocks of {sequence.id} do not follow each other")
            if len(table) != self._num_reserved_blocks(sequence):
                raise IntegrityError(f"{sequence.id} does not hold what was reserved for it")
            if table[0] in held:
                raise IntegrityError(f"{sequence.id} shares its run with another sequence")
            held[table[0]] = len(table)
        self._pool.check_integrity(held)

    def _num_reserved_blocks(self, sequence: Sequence) -> int:
        return self.num_blocks_for(sequence.max_num_computed_tokens)


class ContiguousAllocator(RunAllocator):
    """Room for the longest sequence that the engine allows, whatever the request asks; first fit.

    Orca (Max) of the paper, and what most frameworks did. All runs are equally long, so freed
    memory is as good as new; what is left over at the end of the pool, and most of every run, is
    never used.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, max_model_len: int):
        super().__init__(FirstFitPool(num_blocks), block_size)
        self._num_run_blocks = -(-(max_model_len - 1) // block_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        return self._num_run_blocks


class BuddyAllocator(RunAllocator):
    """Room for the longest that the request itself may become, in the buddy system.

    Orca (Pow2) and (Oracle) of the paper: both place runs in this way, and differ in what is known
    of a request's end. Runs are a power of two blocks long, so up to half of one may be rounding.
    """

    def __init__(self, num_blocks: int, block_size: int = 16):
        super().__init__(BuddyPool(num_blocks), block_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        num_blocks = -(-num_tokens // self.block_size)
        return 1 << (num_blocks - 1).bit_length()
