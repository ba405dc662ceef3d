"""What the runner and the loader need of a model."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from octavo.layers import Slot, StepContext


class Model(nn.Module, ABC):
    """One architecture: wiring of layers, and the checkpoint's names of their weights."""

    _blocks: Sequence[Any] = ()  # what `forward` runs one after the other, if it is made like that

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""

    @abstractmethod
    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones of `context` [S, hidden_size]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], in the weights' dtype."""

    def with_few_blocks(self) -> Self:
        """The same model with its first and last block only: they run every kernel that it runs.

        To find those kernels, not tokens. Architectures whose blocks are not alike keep more.
        """
        few = copy.copy(self)
        few._blocks = [*self._blocks[:1], *self._blocks[-1:]]
        return few
