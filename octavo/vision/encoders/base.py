"""What whoever runs an encoder needs of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.layers import Build, Slot
from octavo.vision.processing import EncoderInput


class VisionEncoder(nn.Module, ABC):
    """From prepared pictures to rows that stand where a prompt has its images."""

    def __init__(self, build: Build):
        super().__init__()
        self._dtype, self._device = build.dtype, build.device

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names, as transformers 5 writes them, and the places that wait."""

    @abstractmethod
    def forward(self, inputs: Sequence[EncoderInput]) -> list[Tensor]:
        """Any number of images -> for each [num_tokens, out_hidden_size], in the model's dtype."""

    def values_of(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """The numbers of all inputs, one after the other along the first dimension."""
        values = [torch.from_numpy(one.values) for one in inputs]
        return torch.cat(values).to(self._device, self._dtype)


def unused(table: Mapping[str, Slot]) -> dict[str, Slot]:
    """Places for tensors that a checkpoint has and this encoder does without."""
    return {name: Slot(slot.shape, lambda tensor: None) for name, slot in table.items()}
