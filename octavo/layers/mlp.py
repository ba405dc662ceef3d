"""The gated feed-forward block (SwiGLU and GEGLU, arXiv 2002.05202)."""

from typing import Any

from torch import Tensor

from octavo.config import MLPConfig
from octavo.kernels import GATED_LINEAR, GELU_TANH_MUL, SILU_MUL, Choice, Op
from octavo.layers.build import Build, Layer
from octavo.layers.linear import Linear
from octavo.layers.slot import Slot

# By the name that `MLPConfig.activation` has for it.
GATES: dict[str, Op[Any]] = {"silu": SILU_MUL, "gelu_tanh": GELU_TANH_MUL}


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, config: MLPConfig, hidden_size: int, build: Build):
        super().__init__()
        intermediate_size, bias = config.intermediate_size, config.bias
        parts = {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up = Linear(parts, hidden_size, build, bias=bias, split="rows")
        self.down = Linear(
            {"down": hidden_size}, intermediate_size, build, bias=bias, split="columns"
        )
        size = self.gate_up.out_features // 2
        sizes = {"size": size, "in_features": hidden_size, "bias": int(bias)}
        if config.activation != "silu":
            sizes[config.activation] = 1
        case = build.case(sizes)
        self._choices = GATED_LINEAR.select(case), GATES[config.activation].select(case)
        self._gate = self._choices[0].function
        self._activate = self._choices[1].function

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors under the usual names."""
        gate_up = {"gate": f"{name}.gate_proj", "up": f"{name}.up_proj"}
        return self.gate_up.slots(gate_up) | self.down.slots({"down": f"{name}.down_proj"})

    def finish(self) -> tuple[Choice[Any], ...]:
        return self._choices

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        gated = self._gate(x, self.gate_up.weight.plain, self.gate_up, self._activate)
        y: Tensor = self.down(gated)
        return y
