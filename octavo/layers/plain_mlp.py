"""The feed-forward block without a gate (arXiv 1706.03762, section 3.3)."""

from typing import Any

from torch import Tensor

from octavo.config import MLPConfig
from octavo.kernels import ACTIVATIONS, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.linear import Linear
from octavo.layers.slot import Slot


class PlainMLP(Layer):
    """down(activation(up(x)))"""

    def __init__(self, config: MLPConfig, hidden_size: int, build: Build):
        super().__init__()
        size, bias = config.intermediate_size, config.bias
        self.up = Linear({"up": size}, hidden_size, build, bias=bias, split="rows")
        self.down = Linear({"down": hidden_size}, size, build, bias=bias, split="columns")
        case = build.case({"size": self.up.out_features})
        self._choice = ACTIVATIONS[config.activation].select(case)
        self._activate = self._choice.function

    def slots(
        self, name: str, up: str = "up_proj", down: str = "down_proj", *, transposed: bool = False
    ) -> dict[str, Slot]:
        """The table of checkpoint tensors; `transposed` as in `Linear.fused_slots`."""
        return self.up.fused_slots(f"{name}.{up}", transposed=transposed) | self.down.fused_slots(
            f"{name}.{down}", transposed=transposed
        )

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        y: Tensor = self.down(self._activate(self.up(x)))
        return y
