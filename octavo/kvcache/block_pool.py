"""The pool of KV blocks: which are free, who holds the others. Pure Python; knows no tensors."""

from collections.abc import Iterable

from octavo.errors import IntegrityError


class BlockPool:
    """Numbers 0..num_blocks-1, each free or held. Sole writer: the allocator that owns the pool.

    The free list is a stack: taking and returning a block are O(1), and the block that was freed
    last, whose memory is warm, goes out first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out `count` free blocks, or raise `IntegrityError`: callers ask `num_free` first."""
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._num_holders[block_id] = 1
        return taken

    def give_back(self, block_ids: Iterable[int]) -> None:
        """Return blocks; one that nobody holds any more becomes free."""
        for block_id in block_ids:
            holders = self._num_holders[block_id] - 1
            if holders < 0:
                raise IntegrityError(f"block {block_id} was freed twice")
            self._num_holders[block_id] = holders
            if holders == 0:
                self._free.append(block_id)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Recount everything from the block tables of all live sequences."""
        counted = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise IntegrityError(f"a block stands twice in one table: {table}")
            for block_id in table:
                counted[block_id] += 1
        if counted != self._num_holders:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._num_holders[b]]
            raise IntegrityError(f"blocks {wrong[:8]} are in more or fewer tables than booked")
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a block stands twice in the free list")
        if free != {b for b in range(self.num_blocks) if counted[b] == 0}:
            raise IntegrityError("the free list is not the set of blocks that nobody holds")
