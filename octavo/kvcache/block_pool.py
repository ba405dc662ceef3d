"""The pool of KV blocks: which are free, who holds the others, which still hold a known prefix.

Pure Python; knows no tensors, no sequences and no policy but "least recently used goes first".
"""

from collections.abc import Callable, Iterable, Iterator

from octavo.errors import IntegrityError


class FreeQueue:
    """Free blocks in the order in which they will be given out. Every operation is O(1).

    A doubly linked list in two arrays, closed to a ring by a sentinel: removing a block from the
    middle, which a prefix hit does, needs no search. Sole writer: the pool.
    """

    def __init__(self, num_blocks: int):
        self._sentinel = num_blocks
        ring = range(num_blocks + 1)
        self._next = [(i + 1) % len(ring) for i in ring]
        self._previous = [(i - 1) % len(ring) for i in ring]
        self._len = num_blocks

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        block_id = self._next[self._sentinel]
        while block_id != self._sentinel:
            yield block_id
            block_id = self._next[block_id]

    def pop(self) -> int:
        """The block that is to be used next; there must be one."""
        block_id = self._next[self._sentinel]
        self.remove(block_id)
        return block_id

    def remove(self, block_id: int) -> None:
        """Take a block out, wherever it stands."""
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before
        self._len -= 1

    def put_first(self, block_id: int) -> None:
        """This block is to be used next."""
        self._link(self._sentinel, block_id, self._next[self._sentinel])

    def put_last(self, block_id: int) -> None:
        """This block is to be used after all others."""
        self._link(self._previous[self._sentinel], block_id, self._sentinel)

    def _link(self, before: int, block_id: int, after: int) -> None:
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self._len += 1


class BlockPool:
    """Blocks 0..num_blocks-1, each free or held by one or more. Sole writer: its allocator.

    A block may carry a key that says what it holds. It keeps the key when it becomes free, until it
    is given out for something else, so that whoever needs the same content can have it back. Free
    blocks without a key go out first, the one freed last before the others, because its memory is
    warm; then those with a key, least recently used first.

    on_evict: called with a block and its key before the block is given out for something else.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        on_evict: Callable[[int, bytes], None] = lambda block_id, key: None,
    ):
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = FreeQueue(num_blocks)
        self._num_holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.num_evictions = 0  # keys forgotten to make room, since start

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without a key."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their content."""
        return len(self._block_of)

    def take(self, count: int) -> list[int]:
        """Hand out `count` free blocks; callers ask `num_free` first.

        Raises:
            IntegrityError: there are not so many.
        """
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._num_holders[block_id] = 1
            key = self._key_of[block_id]
            if key is not None:
                self.forget(block_id)
                self.num_evictions += 1
                self._on_evict(block_id, key)
        return taken

    def find(self, key: bytes) -> int | None:
        """The block that holds this content, or None."""
        return self._block_of.get(key)

    def key_of(self, block_id: int) -> bytes | None:
        """What the block holds, as far as that can be found."""
        return self._key_of[block_id]

    def is_read_by_others(self, block_id: int) -> bool:
        """Whether a holder that wrote to the block would spoil it for somebody else."""
        return self._num_holders[block_id] > 1 or self._key_of[block_id] is not None

    def share(self, block_id: int) -> None:
        """One more holder of a block, which may have been free."""
        if self._num_holders[block_id] == 0:
            self._free.remove(block_id)
        self._num_holders[block_id] += 1

    def name(self, block_id: int, key: bytes) -> None:
        """Let a held block be found by its content. The first block of a content keeps the key."""
        if self._num_holders[block_id] == 0:
            raise IntegrityError(f"block {block_id} was named but nobody holds it")
        if self._key_of[block_id] is None and key not in self._block_of:
            self._key_of[block_id] = key
            self._block_of[key] = block_id

    def give_back(self, block_ids: Iterable[int]) -> None:
        """One holder less of each; a block that nobody holds any more becomes free.

        Among blocks with keys the first one given back is the first to be used again, so callers
        give the end of a sequence back before its beginning, which more requests share.
        """
        for block_id in block_ids:
            num_holders = self._num_holders[block_id] - 1
            if num_holders < 0:
                raise IntegrityError(f"block {block_id} was freed twice")
            self._num_holders[block_id] = num_holders
            if num_holders == 0:
                if self._key_of[block_id] is None:
                    self._free.put_first(block_id)
                else:
                    self._free.put_last(block_id)

    def forget_all(self) -> None:
        """Drop every key: no content can be found any more."""
        for block_id in list(self._block_of.values()):
            self.forget(block_id)

    def forget(self, block_id: int) -> None:
        """The block's content cannot be found any more; whoever holds it goes on doing so."""
        key, self._key_of[block_id] = self._key_of[block_id], None
        if key is not None:
            del self._block_of[key]

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
        free = list(self._free)
        if len(free) != len(self._free) or len(set(free)) != len(free):
            raise IntegrityError("the free queue does not hold each of its blocks once")
        if set(free) != {b for b in range(self.num_blocks) if counted[b] == 0}:
            raise IntegrityError("the free queue is not the set of blocks that nobody holds")
        keys = {key: b for b, key in enumerate(self._key_of) if key is not None}
        if keys != self._block_of:
            raise IntegrityError("the index of contents and the blocks' keys differ")
