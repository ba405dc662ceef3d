"""The allocator of models that keep nothing of a token: there is no pool. Pure Python."""

from collections.abc import Iterable

from octavo.core import Sequence
from octavo.errors import IntegrityError
from octavo.kvcache.unshared import Unshared


class NoBlocks(Unshared):
    """Every sequence fits, with an empty block table: an encoder reads all of a prompt in one step.

    `grows` is 0: nobody ever asks for more, so nothing need be kept for those who run.
    """

    grows = 0
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

    def free(self, sequence: Sequence) -> None:
        self.stop(sequence)

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        for sequence in live:
            if sequence.block_ids:
                raise IntegrityError(f"{sequence.id} holds blocks of a pool that is not there")
