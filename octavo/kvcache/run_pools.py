"""Pools that give out runs of consecutive blocks: first fit, and the buddy system.

What memory managers did before paging. Pure Python; know no tensors, no sequences, and not why a
run has its length. `RunPool` is the seam; blocks are 0..num_blocks-1, each in one run that is held
or in one that is free.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import Protocol

from octavo.errors import IntegrityError


class RunPool(Protocol):
    """Gives out runs of consecutive blocks. Sole writer: its allocator."""

    num_blocks: int

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, however they lie."""
        ...

    @property
    def free_runs(self) -> Mapping[int, int]:
        """First block -> number of blocks, of each free run."""
        ...

    def take(self, count: int) -> int:
        """Hand out a run of `count` blocks and return its first; raise where no run is so long."""
        ...

    def give_back(self, first: int) -> None:
        """Take back the run that begins with this block."""
        ...

    def check_integrity(self, held: Mapping[int, int]) -> None:
        """Recount everything from the runs that are held: first block -> number of blocks."""
        ...


class FirstFitPool:
    """The first free run that is long enough is cut; what comes back joins its neighbours."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free = {0: num_blocks} if num_blocks else {}
        self._starts = list(self._free)  # of free runs, in order
        self._held: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self._held.values())

    @property
    def free_runs(self) -> Mapping[int, int]:
        return self._free

    def take(self, count: int) -> int:
        """A run of `count` blocks, at the lowest place where there is one.

        Raises:
            IntegrityError: no free run is so long.
        """
        for first in self._starts:
            length = self._free[first]
            if length >= count:
                self._remove(first)
                if length > count:
                    self._add(first + count, length - count)
                self._held[first] = count
                return first
        raise IntegrityError(f"a run of {count} blocks asked for, the free ones are {self._free}")

    def give_back(self, first: int) -> None:
        length = _release(self._held, first)
        index = bisect_left(self._starts, first)
        if index < len(self._starts) and self._starts[index] == first + length:
            length += self._remove(self._starts[index])
        if index > 0:
            before = self._starts[index - 1]
            if before + self._free[before] == first:
                first, length = before, length + self._remove(before)
        self._add(first, length)

    def check_integrity(self, held: Mapping[int, int]) -> None:
        _check_runs(self.num_blocks, held, self._held, self._free)
        if self._starts != sorted(self._free):
            raise IntegrityError("the order of free runs is not that of their places")
        for first, length in self._free.items():
            if first + length in self._free:
                raise IntegrityError(f"the free runs before and at {first + length} did not join")

    def _add(self, first: int, length: int) -> None:
        self._free[first] = length
        insort(self._starts, first)

    def _remove(self, first: int) -> int:
        del self._starts[bisect_left(self._starts, first)]
        return self._free.pop(first)


class BuddyPool:
    """Runs of a power of two, halved to what is asked for; freed halves become whole again.

    A run of 2^k blocks begins at a multiple of 2^k, so its other half, its buddy, differs from it
    in one bit of the first block (Knowlton 1965). A pool of any size begins as the powers of two
    that add up to it, largest first, which keeps that rule.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free: dict[int, int] = {}
        self._held: dict[int, int] = {}
        first = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._free[first] = 1 << order
                first += 1 << order

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self._held.values())

    @property
    def free_runs(self) -> Mapping[int, int]:
        return self._free

    def take(self, count: int) -> int:
        """A run of `count` blocks, a power of two, cut from the smallest run that has it.

        Raises:
            IntegrityError: no free run is so long, or `count` is no power of two.
        """
        if count < 1 or count & (count - 1):
            raise IntegrityError(f"{count} is no power of two")
        fitting = [(length, first) for first, length in self._free.items() if length >= count]
        if not fitting:
            raise IntegrityError(f"a run of {count} blocks asked for, the free: {self._free}")
        length, first = min(fitting)
        del self._free[first]
        while length > count:
            length //= 2
            self._free[first + length] = length
        self._held[first] = count
        return first

    def give_back(self, first: int) -> None:
        length = _release(self._held, first)
        while self._free.get(buddy := first ^ length) == length:
            del self._free[buddy]
            first, length = min(first, buddy), 2 * length
        self._free[first] = length

    def check_integrity(self, held: Mapping[int, int]) -> None:
        _check_runs(self.num_blocks, held, self._held, self._free)
        for first, length in [*self._held.items(), *self._free.items()]:
            if length & (length - 1) or first % length:
                raise IntegrityError(f"the run of {length} blocks at {first} is no buddy's")
        for first, length in self._free.items():
            if self._free.get(first ^ length) == length:
                raise IntegrityError(f"the free buddies {first} and {first ^ length} did not join")


def _release(held: dict[int, int], first: int) -> int:
    """Strike a run from the books; return its length."""
    length = held.pop(first, None)
    if length is None:
        raise IntegrityError(f"the run at block {first} was freed twice, or never given out")
    return length


def _check_runs(
    num_blocks: int,
    counted: Mapping[int, int],
    booked: Mapping[int, int],
    free: Mapping[int, int],
) -> None:
    """Held runs are those booked, and with the free ones they hold each block exactly once."""
    if counted != booked:
        raise IntegrityError(f"sequences hold the runs {dict(counted)}, booked are {dict(booked)}")
    if _end_of(sorted([*booked.items(), *free.items()])) != num_blocks:
        raise IntegrityError("held and free runs do not hold each block exactly once")


def _end_of(runs: Iterable[tuple[int, int]]) -> int | None:
    """The block after the last run; None where they do not follow each other from block 0 on."""
    end = 0
    for first, length in runs:
        if first != end or length < 1:
            return None
        end += length
    return end
