"""Normalisation with the residual stream carried along."""

from typing import Any

import torch
from torch import Tensor

from octavo.kernels import RMS_NORM, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.slot import Slot


class RMSNorm(Layer):
    """Root-mean-square normalisation (arXiv 1910.07467, eq. 4) of the residual stream.

    Called with a layer's output and the residual stream, it adds the first to the second and
    returns (normalised stream, stream).
    """

    def __init__(self, size: int, eps: float, build: Build):
        super().__init__()
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)
        self.eps = eps
        self._choice = RMS_NORM.select(build.case({"size": size}))
        self._kernel = self._choice.function

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return {f"{name}.weight": Slot(tuple(self.weight.shape), self.weight.copy_)}

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [T, size] -> (normalised, new residual), both [T, size]."""
        return self._kernel(x, self.weight, self.eps, residual)
