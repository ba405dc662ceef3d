"""Block tables of models some of whose layers see a window only: those blocks are freed behind it.

A sequence has a table for each group of layers (`octavo.core.KVGroups`), all of them in one list.
One pool serves all groups: a block is as large whichever it serves, so whatever long contexts do
not need short ones can have, and nobody divides the memory beforehand.
"""

import itertools
from collections.abc import Iterable

from octavo.core import RUNNING, KVGroups, Sequence, first_seen_block
from octavo.errors import IntegrityError
from octavo.kvcache.allocator import PagedAllocator
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.prefix import key_of


class PoolWithHoles(BlockPool):
    """A pool for tables with holes. The block after its last stands for one: nobody ever has it."""

    def share(self, block_id: int) -> None:
        if block_id != self.num_blocks:
            super().share(block_id)

    def is_read_by_others(self, block_id: int) -> bool:
        return block_id != self.num_blocks and super().is_read_by_others(block_id)

    def give_back(self, block_ids: Iterable[int]) -> None:
        super().give_back(block_id for block_id in block_ids if block_id != self.num_blocks)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        super().check_integrity([[b for b in table if b != self.num_blocks] for table in tables])


class GroupedAllocator(PagedAllocator):
    """Blocks on demand, a table for each group. Behind a window they are given back.

    A group with a window gives a block back when every token that sees it is committed: what was
    planned ahead may still read it, and what follows may be decided by a result that is on its way.
    In its place stands a hole, which the runner has memory for and no kernel reads. Ahead of it the
    group holds what the longest steps take, from the start on: half a prompt helps nobody.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, groups: KVGroups):
        super().__init__(num_blocks, block_size)
        self._pool = PoolWithHoles(num_blocks)
        self._hole = num_blocks
        self._groups = groups
        self._windows = groups.windows
        # Neighbours with equal windows gain and lose their blocks together: (window, first group,
        # the one after the last).
        self._kinds: list[tuple[int | None, int, int]] = []
        for window, alike in itertools.groupby(groups.windows):
            first = self._kinds[-1][2] if self._kinds else 0
            self._kinds.append((window, first, first + len(list(alike))))
        self.grows = groups.num_groups

    def num_blocks_for(self, num_tokens: int) -> int:
        return self._groups.num_blocks_for(num_tokens, self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        missing = len(self._lacking(sequence, num_tokens))
        return missing + len(self._spoilt(sequence)) if sequence.shares_blocks else missing

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        table = sequence.block_ids
        first = len(table)
        lacking = self._lacking(sequence, num_tokens)
        spoilt = self._spoilt(sequence) if sequence.shares_blocks else []
        if not lacking and not spoilt:
            return first
        taken = self._pool.take(len(lacking) + len(spoilt))
        for place in spoilt:
            self._copy(sequence, place, taken.pop())
        num_groups = len(self._windows)
        num_rows = max(lacking, default=0) // num_groups + 1
        table += [self._hole] * (num_rows * num_groups - first)
        for place, block_id in zip(lacking, taken, strict=True):
            table[place] = block_id
        return min(first, *lacking, *spoilt)

    def computed(self, sequence: Sequence) -> None:
        """Give back what nobody sees any more of those that are still to be computed."""
        table, num_groups = sequence.block_ids, len(self._windows)
        for window, first, stop in self._kinds:
            if window is None:
                continue
            place = self._first_seen(sequence.num_committed_tokens, window) * num_groups + first
            while (place := place - num_groups) >= 0 and table[place] != self._hole:
                unseen = slice(place, place + stop - first)
                self._pool.give_back(table[unseen])
                table[unseen] = [self._hole] * (stop - first)

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        live = list(live)
        self._pool.check_integrity([sequence.block_ids for sequence in live])
        for sequence in live:
            if sequence.status is RUNNING:
                self._check_table(sequence)

    def _check_table(self, sequence: Sequence) -> None:
        """Every token that is seen has a block, and windows hold no more than their share."""
        table, num_groups = sequence.block_ids, len(self._windows)
        stop = -(-sequence.num_computed_tokens // self.block_size)
        if len(table) % num_groups or len(table) < stop * num_groups:
            raise IntegrityError(f"{sequence.id} has computed more tokens than it has slots")
        for group, window in enumerate(self._windows):
            own = table[group::num_groups]
            first = 0
            if window is not None:
                first = self._first_seen(sequence.num_committed_tokens, window)
            if self._hole in own[first:stop]:
                raise IntegrityError(f"{sequence.id} has a hole among the blocks that it sees")
        num_held = len(table) - table.count(self._hole)
        if num_held > self.num_blocks_for(len(table) // num_groups * self.block_size):
            raise IntegrityError(f"{sequence.id} holds blocks that nobody sees any more")

    def _lacking(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Places of the table that need a block before so many tokens can be written.

        Of a window so many that with those that it gives back on the way it can go to the end.
        """
        table, num_groups, size = sequence.block_ids, len(self._windows), self.block_size
        start, stop = sequence.num_computed_tokens, -(-num_tokens // size)
        row = start // size
        own_row = table[row * num_groups : stop * num_groups]
        if stop == row + 1 and len(own_row) == num_groups and self._hole not in own_row:
            return []  # as nearly always: the last blocks have room
        known = sequence.num_committed_tokens if sequence.status is RUNNING else start
        lacking: list[int] = []
        for window, first, last in self._kinds:
            rows = range(len(table) // num_groups, stop)
            if window is not None:
                end = self._first_seen(known, window) + self._groups.most_blocks(window, size)
                rows = range(row, min(stop, end))
            for place in range(rows.start * num_groups + first, rows.stop * num_groups, num_groups):
                if place >= len(table) or table[place] == self._hole:
                    lacking += range(place, place + last - first)
        return lacking

    def _spoilt(self, sequence: Sequence) -> list[int]:
        """Places whose blocks the sequence writes to next although they are not its alone."""
        first = sequence.num_computed_tokens // self.block_size * len(self._windows)
        row = sequence.block_ids[first : first + len(self._windows)]
        return [first + i for i, b in enumerate(row) if self._pool.is_read_by_others(b)]

    def _beginning_of(self, table: list[int], num_tokens: int) -> list[int]:
        num_groups, num_blocks = len(self._windows), -(-num_tokens // self.block_size)
        shared = table[: num_blocks * num_groups]  # empty where the other one has lost its KV
        for group, window in enumerate(self._windows):
            first = 0 if window is None else self._first_seen(num_tokens, window)
            unseen = slice(group, first * num_groups, num_groups)
            shared[unseen] = [self._hole] * len(shared[unseen])
            if self._hole in shared[first * num_groups + group :: num_groups]:
                return []  # the other one has gone on, and left them behind
        return shared

    def _first_seen(self, num_tokens: int, window: int) -> int:
        return first_seen_block(window, num_tokens, self.block_size)


class GroupedPrefixAllocator(GroupedAllocator):
    """The same, and full blocks are found again by the tokens they hold and all before them.

    A hit of n tokens needs all blocks of the groups that keep everything, and of a window those
    that token n sees. What a window leaves behind can be found until it is used for something else.
    """

    def start(self, sequence: Sequence) -> int:
        """A table of the blocks shared or found. The last token is always computed."""
        num_shared = super().start(sequence)
        if num_shared:
            sequence.num_named_blocks = num_shared // self.block_size
            return num_shared
        num_blocks = self._longest_hit(sequence)
        num_tokens = num_blocks * self.block_size
        firsts = [0 if w is None else self._first_seen(num_tokens, w) for w in self._windows]
        for index in range(num_blocks):
            for group, first in enumerate(firsts):
                block_id = self._find(sequence, index, group) if index >= first else self._hole
                self._pool.share(block_id)
                sequence.block_ids.append(block_id)
        sequence.num_named_blocks = num_blocks
        return num_tokens

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        sequence.block_keys = []
        sequence.num_named_blocks = 0  # naming a block again does nothing
        return super().refork(sequence, parent_block_ids)

    def computed(self, sequence: Sequence) -> None:
        """Let the blocks that have just become full be found, and give back what is not seen."""
        table, num_groups = sequence.block_ids, len(self._windows)
        num_full = sequence.num_committed_tokens // self.block_size
        while sequence.num_named_blocks < num_full:
            index = sequence.num_named_blocks
            for group in range(num_groups):
                block_id = table[index * num_groups + group]
                if block_id != self._hole:
                    self._pool.name(block_id, self._name(sequence, index, group))
            sequence.num_named_blocks += 1
        super().computed(sequence)

    def discredit(self, sequence: Sequence) -> None:
        """Forget all of these contents, those too that were left behind a window."""
        for index in range(sequence.num_named_blocks):
            for group in range(len(self._windows)):
                block_id = self._find(sequence, index, group)
                if block_id != self._hole:
                    self._pool.forget(block_id)

    def forget_all(self) -> None:
        """Empty the prefix cache; what running sequences hold stays theirs."""
        self._pool.forget_all()

    def _longest_hit(self, sequence: Sequence) -> int:
        """Blocks of the longest beginning of which each group has what token n sees."""
        most = sequence.num_reusable_tokens // self.block_size
        num_blocks, last = self._hit_at_most(sequence, most), most
        while num_blocks < last:
            num_blocks, last = self._hit_at_most(sequence, num_blocks), num_blocks
        return num_blocks

    def _hit_at_most(self, sequence: Sequence, num_blocks: int) -> int:
        """`num_blocks`, or how many fewer some group allows; only what is returned twice holds."""
        for group, window in enumerate(self._windows):
            if window is None:
                missing = (i for i in range(num_blocks) if self._lacks(sequence, i, group))
                num_blocks = next(missing, num_blocks)
            else:
                num_blocks = self._hit_in_window(sequence, num_blocks, group, window)
        return num_blocks

    def _hit_in_window(self, sequence: Sequence, num_blocks: int, group: int, window: int) -> int:
        """The longest hit of one group: from its end back, as many in a row as a window sees."""
        index = num_blocks
        while index > self._first_seen(num_blocks * self.block_size, window):
            index -= 1
            if self._lacks(sequence, index, group):
                num_blocks = index
        return num_blocks

    def _lacks(self, sequence: Sequence, index: int, group: int) -> bool:
        return self._find(sequence, index, group) == self._hole

    def _find(self, sequence: Sequence, index: int, group: int) -> int:
        block_id = self._pool.find(self._name(sequence, index, group))
        return self._hole if block_id is None else block_id

    def _name(self, sequence: Sequence, index: int, group: int) -> bytes:
        return key_of(sequence, index, self.block_size) + group.to_bytes(2, "little")
