"""Block tables: which blocks a sequence holds. Pure Python; knows no tensors and no policy.

`Allocator` is the seam behind which the ways of giving KV memory to sequences stand side by side.
"""

from collections.abc import Iterable
from typing import Protocol

from octavo.core import Sequence
from octavo.kvcache.block_pool import BlockPool


class Allocator(Protocol):
    """Gives KV memory to sequences. The only writer of `Sequence.block_ids`."""

    block_size: int
    num_blocks: int

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new sequence could take now."""
        ...

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to add so that the sequence can hold `num_tokens` tokens."""
        ...

    def start(self, sequence: Sequence) -> int:
        """Begin a block table; return how many leading tokens already have their KV in it."""
        ...

    def extend(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Make room for `num_tokens` tokens in all; return the blocks added, in order."""
        ...

    def free(self, sequence: Sequence) -> None:
        """Give everything back."""
        ...

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Recount everything from the live sequences' block tables."""
        ...


class PagedAllocator:
    """PagedAttention's allocator: blocks on demand, anywhere (arXiv 2309.06180, section 4).

    At most `block_size - 1` slots of a sequence are ever reserved and unused.
    """

    def __init__(self, num_blocks: int, block_size: int = 16):
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._pool = BlockPool(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_ids))

    def start(self, sequence: Sequence) -> int:
        """An empty table: without a prefix index, no KV is there before it is computed."""
        sequence.block_ids = []
        return 0

    def extend(self, sequence: Sequence, num_tokens: int) -> list[int]:
        missing = self.num_missing_blocks(sequence, num_tokens)
        if missing == 0:
            return []
        added = self._pool.take(missing)
        sequence.block_ids.extend(added)
        return added

    def free(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.block_ids)
        sequence.block_ids = []

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        self._pool.check_integrity([sequence.block_ids for sequence in live])
