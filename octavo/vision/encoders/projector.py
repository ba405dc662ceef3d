"""Two products with an activation between them, from an encoder's width to another."""

from typing import Any

from torch import Tensor

from octavo.config import MLPConfig
from octavo.kernels import ACTIVATIONS, Choice
from octavo.layers import Build, Layer, Linear, Slot


class Projector(Layer):
    """second(activation(first(x))): what `PlainMLP` is, with an output of a width of its own."""

    def __init__(self, config: MLPConfig, build: Build, *, in_size: int, out_size: int):
        super().__init__()
        size, bias = config.intermediate_size, config.bias
        self.first = Linear({"first": size}, in_size, build, bias=bias, split="rows")
        self.second = Linear({"second": out_size}, size, build, bias=bias, split="columns")
        case = build.case({"size": self.first.out_features})
        self._choice = ACTIVATIONS[config.activation].select(case)

    def slots(self, first: str, second: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return self.first.slots({"first": first}) | self.second.slots({"second": second})

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_size] -> [T, out_size]."""
        y: Tensor = self.second(self._choice.function(self.first(x)))
        return y
