"""What the runner and the loader need of a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from octavo.layers import AdapterSlots, SectionAngles, Slot, StepContext

if TYPE_CHECKING:  # a model that sees imports what looks; others start without it
    from octavo.vision.encoders import VisionEncoder


class Model(nn.Module, ABC):
    """One architecture: wiring of layers, and the checkpoint's names of their weights."""

    adapters: AdapterSlots | None = None  # where it was given some (`adapt_model`)
    angles: SectionAngles | None = None  # where it turns by three positions of each token
    _blocks: Sequence[Any] = ()  # what `forward` runs one after the other, if it is made like that
    _kinds: Sequence[Hashable] = ()  # of its blocks: those that are equal run the same kernels

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""

    def slot_name(self, name: str) -> str | None:
        """The name in `slots` of a tensor as a checkpoint has it, which may leave a prefix out.

        None: the model has no use for what may well be there.
        """
        return name

    @property
    def image_encoder(self) -> VisionEncoder | None:
        """What makes rows of images, in models that see any."""
        return None

    @abstractmethod
    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones of `context` [S, hidden_size]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], in the weights' dtype."""

    def with_few_blocks(self) -> Self:
        """The same model with its first and last block and one of each kind, in their order.

        To find the kernels that it runs, not tokens.
        """
        kept = {0, len(self._blocks) - 1}
        kept |= {self._kinds.index(kind) for kind in set(self._kinds)}
        few = copy.copy(self)
        few._blocks = [block for i, block in enumerate(self._blocks) if i in kept]
        return few
