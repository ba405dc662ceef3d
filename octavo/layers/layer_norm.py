"""Layer normalisation of the residual stream, which it carries along."""

from typing import Any

import torch
from torch import Tensor

from octavo.config import ModelConfig
from octavo.kernels import LAYER_NORM, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.norm import RMSNorm
from octavo.layers.slot import Slot


class LayerNorm(Layer):
    """Layer normalisation (arXiv 1607.06450, eq. 4), with a weight and a bias.

    Called with a layer's output and the residual stream, it adds the first to the second and
    returns (normalised stream, stream), as `RMSNorm` does.
    """

    def __init__(self, size: int, eps: float, build: Build):
        super().__init__()
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)
        self.bias = torch.empty_like(self.weight)
        self.eps = eps
        self._choice = LAYER_NORM.select(build.case({"size": size}))
        self._kernel = self._choice.function

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        shape = tuple(self.weight.shape)
        return {
            f"{name}.weight": Slot(shape, self.weight.copy_),
            f"{name}.bias": Slot(shape, self.bias.copy_),
        }

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [T, size] -> (normalised, new residual), both [T, size]."""
        return self._kernel(x, self.weight, self.bias, self.eps, residual)


def residual_norm(config: ModelConfig, build: Build) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that a model's config asks for."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, build)
    zero_centered = config.zero_centered_norms
    return RMSNorm(config.hidden_size, config.norm_eps, build, zero_centered=zero_centered)
