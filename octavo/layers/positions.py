"""Learned positions: a vector for each, added to the token's."""

import torch
from torch import Tensor, nn

from octavo.layers.build import Build
from octavo.layers.slot import Slot


class LearnedPositions:
    """A table of vectors (arXiv 1706.03762, section 3.5).

    It is whole on every rank, and has a row for each position that the model was trained for.
    """

    def __init__(self, num_rows: int, hidden_size: int, build: Build, *, offset: int = 0):
        """`offset`: rows before that of position 0, which nobody reads (OPT's two)."""
        shape = (num_rows, hidden_size)
        self.table = torch.empty(shape, dtype=build.dtype, device=build.device)
        self._from_0 = self.table[offset:]

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return {f"{name}.weight": Slot(tuple(self.table.shape), self.table.copy_)}

    def added_to(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, hidden_size], positions [T] -> [T, hidden_size], written over x."""
        return x.add_(nn.functional.embedding(positions, self._from_0))
