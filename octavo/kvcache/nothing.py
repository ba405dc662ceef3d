"""The allocator of models that keep nothing of a token: there is no pool. Pure Python."""

from collections.abc import Iterable

from octavo.core import Sequence, Tier, Transfer
from octavo.errors import IntegrityError


class NoBlocks:
    """Every sequence fits, with an empty block table: an encoder reads all of a prompt in one step.

    `grows` is False: nobody ever asks for more, so nothing need be kept for those who run.
    """

    grows = False
    num_blocks = 0
    num_free_blocks = 0

    def __init__(self, block_size: int = 16):
        self.block_size = block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        return 0

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return 0

    def num_stranded_blocks(self, sequence: Sequence) -> int:
        return 0

    def start(self, sequence: Sequence) -> int:
        sequence.block_ids = []
        return 0

    def stop(self, sequence: Sequence) -> None:
        sequence.block_ids = []

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        return 0

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        """There is no past to go on from."""
        return False

    def computed(self, sequence: Sequence) -> None:
        return  # nothing is kept

    def swap_out(self, sequence: Sequence) -> bool:
        """There is nothing to swap."""
        return False

    def free(self, sequence: Sequence) -> None:
        self.stop(sequence)

    def discredit(self, sequence: Sequence) -> None:
        return  # nothing can be found

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Nothing is ever copied."""
        return ()

    def lose(self, places: Iterable[tuple[Tier, int]]) -> None:
        return  # nothing was to be copied

    def forget_all(self) -> None:
        return  # nothing can be found

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        for sequence in live:
            if sequence.block_ids:
                raise IntegrityError(f"{sequence.id} holds blocks of a pool that is not there")
