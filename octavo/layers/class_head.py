"""The head that makes scores of a vector instead of logits of tokens."""

import torch
from torch import Tensor, nn

from octavo.config import ClassHead as ClassHeadConfig
from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.layers.slot import Slot


class ClassHead(nn.Module):
    """out(tanh(dense(x))), and a sigmoid of that where the config has one."""

    def __init__(self, config: ClassHeadConfig, hidden_size: int, build: Build):
        super().__init__()
        self.dense = Linear({"dense": hidden_size}, hidden_size, build, bias=True)
        self.out = Linear({"out": config.num_classes}, hidden_size, build, bias=True)
        self._sigmoid = config.sigmoid

    def slots(self, dense: str, out: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return self.dense.slots({"dense": dense}) | self.out.slots({"out": out})

    def forward(self, x: Tensor) -> Tensor:
        """x [S, hidden_size] -> [S, num_classes]."""
        scores: Tensor = self.out(torch.tanh(self.dense(x)))
        return torch.sigmoid(scores) if self._sigmoid else scores
