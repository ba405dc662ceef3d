"""Where KV memory goes: one count for all allocators, by the categories of PagedAttention's paper.

Pure Python; reads block tables and changes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from octavo.core import Sequence
from octavo.errors import IntegrityError
from octavo.kvcache.allocator import Allocator


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The slots of a KV pool, each in one category (arXiv 2309.06180, section 3.1, figures 2, 3).

    A slot holds the KV of one token. It is

    used          computed: it holds a token's KV, or will when the step in flight is done; where
                  sequences share a block, its slots count once ("token states")
    reserved      given to a sequence that has not computed it yet, but will before its end
                  ("reservation")
    internal      given to a sequence that will never use it: beyond its end, be it because more
                  was reserved than needed, or because lengths were rounded up to whole blocks or
                  powers of two ("internal fragmentation")
    external      free, in a run too short for the sequence that wants memory next ("external
                  fragmentation"); always 0 where blocks may lie anywhere
    free          free, and of use to whoever comes next
    """

    num_used_slots: int
    num_reserved_slots: int
    num_internal_slots: int
    num_external_slots: int
    num_free_slots: int

    @property
    def num_slots(self) -> int:
        """All slots of the pool."""
        return self.num_given_slots + self.num_external_slots + self.num_free_slots

    @property
    def num_given_slots(self) -> int:
        """Slots that sequences hold."""
        return self.num_used_slots + self.num_reserved_slots + self.num_internal_slots


def longest_end(sequence: Sequence) -> int:
    """Tokens whose KV a sequence may come to hold; the last one generated is never computed."""
    return sequence.max_num_computed_tokens


def measure_memory(
    allocator: Allocator,
    live: Iterable[Sequence],
    *,
    end: Callable[[Sequence], int] = longest_end,
    wish: Sequence | None = None,
) -> MemoryUse:
    """Count the pool's slots.

    live: every sequence that holds blocks; others do no harm.
    end: how many tokens' KV a sequence will hold at its end. An engine can only know the longest
        that is possible, so that "internal" is what was wasted for certain; whoever knows the true
        lengths, because the requests have run or were made up, splits reserved and internal as the
        paper does.
    wish: the sequence that wants memory next; without it nothing counts as external.

    Raises:
        IntegrityError: blocks are neither free nor in a table of `live`.
    """
    block_size = allocator.block_size
    seen: set[int] = set()
    num_used = num_reserved = 0
    # Sequences share a beginning of their tables. Of those who do, the furthest counts it.
    for sequence in sorted(live, key=lambda s: s.num_computed_tokens, reverse=True):
        table = sequence.block_ids
        num_shared = next((i for i, b in enumerate(table) if b not in seen), len(table))
        seen.update(table)
        first, limit = num_shared * block_size, len(table) * block_size
        computed = min(max(sequence.num_computed_tokens, first), limit)
        num_used += computed - first
        num_reserved += max(0, min(end(sequence), limit) - computed)
    num_free_blocks = allocator.num_free_blocks
    if len(seen) + num_free_blocks != allocator.num_blocks:
        raise IntegrityError(
            f"of {allocator.num_blocks} blocks {len(seen)} are in tables and {num_free_blocks} free"
        )
    num_stranded_blocks = 0 if wish is None else allocator.num_stranded_blocks(wish)
    return MemoryUse(
        num_used_slots=num_used,
        num_reserved_slots=num_reserved,
        num_internal_slots=len(seen) * block_size - num_used - num_reserved,
        num_external_slots=num_stranded_blocks * block_size,
        num_free_slots=(num_free_blocks - num_stranded_blocks) * block_size,
    )
