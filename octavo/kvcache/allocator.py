"""Block tables: which blocks a sequence holds. Pure Python; knows no tensors and no policy.

`Allocator` is the seam behind which the ways of giving KV memory to sequences stand side by side.
"""

from collections.abc import Iterable
from typing import Protocol

from octavo.core import RUNNING, Sequence, Tier, Transfer
from octavo.errors import IntegrityError
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.prefix import key_of
from octavo.kvcache.unshared import Unnamed


class Allocator(Protocol):
    """Gives KV memory to sequences. The only writer of a sequence's block table, keys and swap."""

    block_size: int
    num_blocks: int
    grows: int  # further blocks that a running sequence may ask for at a time; 0: none, ever

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence is given which may come to hold the KV of `num_tokens` tokens.

        More than `num_blocks` where that could never be had, even alone.
        """
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be given out now."""
        ...

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Free blocks that it takes to let the sequence write up to `num_tokens` tokens."""
        ...

    def num_stranded_blocks(self, sequence: Sequence) -> int:
        """Free blocks that this waiting sequence cannot use: external fragmentation."""
        ...

    def start(self, sequence: Sequence) -> int:
        """Begin a block table; return how many leading tokens need not be computed."""
        ...

    def stop(self, sequence: Sequence) -> None:
        """Undo `start`: the sequence waits on."""
        ...

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        """Make room to write up to `num_tokens` tokens; return the first table entry changed."""
        ...

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        """Forget its own past and go on from another's table, all of whose tokens are its own now.

        False, and no blocks, where that table is empty or blocks cannot be shared.
        """
        ...

    def computed(self, sequence: Sequence) -> None:
        """KV of the sequence's first `num_committed_tokens` tokens is now in its blocks."""
        ...

    def swap_out(self, sequence: Sequence) -> bool:
        """Give the blocks back and keep their content in host memory, if there is room for it."""
        ...

    def free(self, sequence: Sequence) -> None:
        """Give everything back."""
        ...

    def discredit(self, sequence: Sequence) -> None:
        """What the sequence computed is wrong: nobody must find it."""
        ...

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Copies that must be made before the next step, in order; each is told once."""
        ...

    def lose(self, places: Iterable[tuple[Tier, int]]) -> None:
        """The content of these blocks is not what it was taken for: nobody must find it."""
        ...

    def forget_all(self) -> None:
        """Empty the prefix cache, where there is one; what live sequences hold stays theirs."""
        ...

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Recount everything from the live sequences' block tables."""
        ...


def check_slots(live: Iterable[Sequence], block_size: int) -> None:
    """Raise `IntegrityError` where a running sequence has more computed tokens than slots."""
    for sequence in live:
        num_slots = len(sequence.block_ids) * block_size
        if sequence.status is RUNNING and sequence.num_computed_tokens > num_slots:
            raise IntegrityError(f"{sequence.id} has computed more tokens than it has slots")


class PagedAllocator(Unnamed):
    """PagedAttention's allocator: blocks on demand, anywhere (arXiv 2309.06180, section 4).

    At most `block_size - 1` slots of a sequence are ever reserved and unused. A sequence that was
    forked shares its parent's blocks; whoever first writes to a shared block gets a copy of it.
    """

    grows = 1

    def __init__(self, num_blocks: int, block_size: int = 16):
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._pool = BlockPool(num_blocks)
        self._transfers: list[Transfer] = []

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        missing = -(-num_tokens // self.block_size) - len(sequence.block_ids)
        if missing < 0:
            missing = 0
        return missing + 1 if sequence.shares_blocks and self._must_copy(sequence) else missing

    def num_stranded_blocks(self, sequence: Sequence) -> int:
        """None: any free block will do."""
        return 0

    def start(self, sequence: Sequence) -> int:
        """A table of the blocks shared with the sequence that it was forked from, if it has any.

        At least the last token is computed, for its logits are needed.
        """
        sequence.block_ids = []
        if sequence.fork is None:
            return 0
        parent, num_common = sequence.fork
        num_tokens = min(num_common, parent.num_committed_tokens, sequence.num_reusable_tokens)
        shared = self._beginning_of(parent.block_ids, num_tokens) if num_tokens > 0 else []
        if not shared:
            return 0
        self._share(sequence, shared)
        parent.shares_blocks = True
        return num_tokens

    def stop(self, sequence: Sequence) -> None:
        self._pool.give_back(reversed(sequence.block_ids))
        sequence.block_ids = []

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        before = sequence.block_ids
        self._share(sequence, parent_block_ids)
        self._pool.give_back(reversed(before))
        return bool(parent_block_ids)

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        first = len(sequence.block_ids)
        if num_tokens <= first * self.block_size and not sequence.shares_blocks:
            return first  # as nearly always: the last block has room
        if missing := self.num_missing_blocks(sequence, num_tokens):
            copies = sequence.shares_blocks and self._must_copy(sequence)
            added = self._pool.take(missing)
            if copies:
                first = sequence.num_computed_tokens // self.block_size
                self._copy(sequence, first, added.pop())
            sequence.block_ids.extend(added)
        return first

    def free(self, sequence: Sequence) -> None:
        self.stop(sequence)

    def take_transfers(self) -> tuple[Transfer, ...]:
        transfers = tuple(self._transfers)
        self._transfers.clear()
        return transfers

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        live = list(live)
        check_slots(live, self.block_size)
        self._pool.check_integrity([sequence.block_ids for sequence in live])

    def _beginning_of(self, table: list[int], num_tokens: int) -> list[int]:
        """What another sequence's table has of its first tokens; empty where some of it is gone."""
        return table[: -(-num_tokens // self.block_size)]

    def _share(self, sequence: Sequence, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._pool.share(block_id)
        sequence.block_ids = list(block_ids)
        sequence.shares_blocks = True

    def _must_copy(self, sequence: Sequence) -> bool:
        """Whether the block that the sequence writes to next is not its alone."""
        index = sequence.num_computed_tokens // self.block_size
        table = sequence.block_ids
        return index < len(table) and self._pool.is_read_by_others(table[index])

    def _copy(self, sequence: Sequence, index: int, target: int) -> None:
        source = sequence.block_ids[index]
        self._transfers.append(Transfer(Tier.DEVICE, source, Tier.DEVICE, target))
        sequence.block_ids[index] = target
        self._pool.give_back([source])


class PrefixAllocator(PagedAllocator):
    """Paged, and full blocks are found again by the tokens they hold and all before them.

    A sequence starts with the longest chain of blocks that some sequence, alive or gone, has
    computed for the same beginning. Lookup, reuse and eviction are O(1) a block. Only full blocks
    are found, and a full block is never written again, so finding needs no copy.
    """

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by their content."""
        return self._pool.num_cached

    def start(self, sequence: Sequence) -> int:
        """A table of the blocks shared or found. The last token is always computed."""
        num_shared = super().start(sequence)
        if num_shared:
            sequence.num_named_blocks = num_shared // self.block_size
            return num_shared
        for index in range(self._num_findable(sequence)):
            block_id = self._pool.find(self._key(sequence, index))
            if block_id is None:
                break
            self._pool.share(block_id)
            sequence.block_ids.append(block_id)
        sequence.num_named_blocks = len(sequence.block_ids)
        return len(sequence.block_ids) * self.block_size

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        sequence.block_keys = []
        sequence.num_named_blocks = 0  # naming a block again does nothing
        return super().refork(sequence, parent_block_ids)

    def computed(self, sequence: Sequence) -> None:
        """Let the blocks that have just become full be found."""
        num_full = sequence.num_committed_tokens // self.block_size
        while sequence.num_named_blocks < num_full:
            index = sequence.num_named_blocks
            self._pool.name(sequence.block_ids[index], self._key(sequence, index))
            sequence.num_named_blocks += 1

    def discredit(self, sequence: Sequence) -> None:
        """Forget what it named, and with it what it found: which of them is bad nobody knows."""
        for block_id in sequence.block_ids:
            self._pool.forget(block_id)

    def forget_all(self) -> None:
        """Empty the prefix cache; what running sequences hold stays theirs."""
        self._pool.forget_all()

    def _num_findable(self, sequence: Sequence) -> int:
        return sequence.num_reusable_tokens // self.block_size

    def _key(self, sequence: Sequence, index: int) -> bytes:
        return key_of(sequence, index, self.block_size)
