"""Block tables: which blocks a sequence holds. Pure Python; knows no tensors and no policy.

`Allocator` is the seam behind which the ways of giving KV memory to sequences stand side by side.
"""

from collections.abc import Iterable
from typing import Protocol

from octavo.core import Sequence
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.prefix import block_key, chain_root


class Allocator(Protocol):
    """Gives KV memory to sequences. The only writer of `Sequence.block_ids` and `.block_keys`."""

    block_size: int
    num_blocks: int

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be given out now."""
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

    def computed(self, sequence: Sequence) -> None:
        """KV of the sequence's first `num_committed_tokens` tokens is now in its blocks."""
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
        """An empty table: no KV is there before it is computed."""
        sequence.block_ids = []
        return 0

    def extend(self, sequence: Sequence, num_tokens: int) -> list[int]:
        missing = self.num_missing_blocks(sequence, num_tokens)
        if missing == 0:
            return []
        added = self._pool.take(missing)
        sequence.block_ids.extend(added)
        return added

    def computed(self, sequence: Sequence) -> None:
        """Nothing to note: nobody looks for contents."""

    def free(self, sequence: Sequence) -> None:
        self._pool.give_back(reversed(sequence.block_ids))
        sequence.block_ids = []

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        self._pool.check_integrity([sequence.block_ids for sequence in live])


class PrefixAllocator(PagedAllocator):
    """Paged, and full blocks are found again by the tokens they hold and all before them.

    A sequence starts with the longest chain of blocks that some sequence, alive or gone, has
    computed for the same beginning. Lookup, reuse and eviction are O(1) a block. Only full blocks
    are shared, and a full block is never written again, so sharing needs no copy.
    """

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by their content."""
        return self._pool.num_cached

    def start(self, sequence: Sequence) -> int:
        """A table of the blocks found. The last token is always computed: its logits are needed."""
        sequence.block_ids = []
        num_findable = (len(sequence.token_ids) - 1) // self.block_size
        for index in range(num_findable):
            block_id = self._pool.find(self._key(sequence, index))
            if block_id is None:
                break
            self._pool.share(block_id)
            sequence.block_ids.append(block_id)
        sequence.num_named_blocks = len(sequence.block_ids)
        return len(sequence.block_ids) * self.block_size

    def computed(self, sequence: Sequence) -> None:
        """Let the blocks that have just become full be found."""
        num_full = sequence.num_committed_tokens // self.block_size
        while sequence.num_named_blocks < num_full:
            index = sequence.num_named_blocks
            self._pool.name(sequence.block_ids[index], self._key(sequence, index))
            sequence.num_named_blocks += 1

    def forget_all(self) -> None:
        """Empty the prefix cache; what running sequences hold stays theirs."""
        self._pool.forget_all()

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """The key of a sequence's full block; keys are computed once and kept."""
        keys = sequence.block_keys
        while len(keys) <= index:
            parent = keys[-1] if keys else chain_root(sequence.request.cache_extras)
            start = len(keys) * self.block_size
            keys.append(block_key(parent, sequence.token_ids[start : start + self.block_size]))
        return keys[index]
