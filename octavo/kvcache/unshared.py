"""What simpler allocators answer to questions about contents that nobody finds, moves or shares."""

from collections.abc import Iterable

from octavo.core import Sequence, Tier, Transfer


class Unnamed:
    """The part of an `Allocator` that is about contents, where they have neither name nor copy."""

    def computed(self, sequence: Sequence) -> None:
        return  # nobody looks for contents

    def swap_out(self, sequence: Sequence) -> bool:
        """There is no other memory."""
        return False

    def discredit(self, sequence: Sequence) -> None:
        return  # nothing can be found

    def lose(self, places: Iterable[tuple[Tier, int]]) -> None:
        return  # nothing is kept outside of the blocks that sequences hold

    def forget_all(self) -> None:
        return  # nothing can be found


class Unshared(Unnamed):
    """The same where each content belongs to one sequence."""

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        """Blocks cannot be shared."""
        return False

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Nothing is ever copied."""
        return ()
