"""What the runner and the loader need of a model."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from octavo.layers import Slot, StepContext


class Model(nn.Module, ABC):
    """One architecture: wiring of layers, and the checkpoint's names of their weights."""

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""

    @abstractmethod
    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones of `context` [S, hidden_size]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], in the weights' dtype."""
