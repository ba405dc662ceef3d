"""What allocators without sharing have in common: nobody finds, copies or forks a block."""

from collections.abc import Iterable

from octavo.core import Sequence, Tier, Transfer


class Unshared:
    """The part of an `Allocator` that is about contents, where each one belongs to one sequence."""

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        """Blocks cannot be shared."""
        return False

    def computed(self, sequence: Sequence) -> None:
        return  # nobody looks for contents

    def swap_out(self, sequence: Sequence) -> bool:
        """There is no other memory."""
        return False

    def discredit(self, sequence: Sequence) -> None:
        return  # nothing can be found

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Nothing is ever copied."""
        return ()

    def lose(self, places: Iterable[tuple[Tier, int]]) -> None:
        return  # nothing was to be copied

    def forget_all(self) -> None:
        return  # nothing can be found
