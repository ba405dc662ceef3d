"""Normalisation: of the residual stream, which it carries along, and of queries and keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import RMS_NORM, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.slot import Slot


class RMSNorm(Layer):
    """Root-mean-square normalisation (arXiv 1910.07467, eq. 4) of the residual stream.

    Called with a layer's output and the residual stream, it adds the first to the second and
    returns (normalised stream, stream). `zero_centered`: checkpoints have the weight less one
    (Gemma). It is kept in fp32, where one can be added without a loss, and multiplies there.
    """

    def __init__(self, size: int, eps: float, build: Build, *, zero_centered: bool = False):
        super().__init__()
        self.weight = _empty_weight(size, build, zero_centered)
        self._load = _loader(self.weight, zero_centered)
        self.eps = eps
        self._choice = RMS_NORM.select(build.case({"size": size}))
        self._kernel = self._choice.function

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return {f"{name}.weight": Slot(tuple(self.weight.shape), self._load)}

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [T, size] -> (normalised, new residual), both [T, size]."""
        return self._kernel(x, self.weight, self.eps, residual)


class QKNorm:
    """An RMS norm over each query head, and one over each key head. `Attention` runs them.

    `zero_centered` as of `RMSNorm`.
    """

    def __init__(self, head_dim: int, eps: float, build: Build, *, zero_centered: bool = False):
        # All heads share one weight, and so do all ranks.
        self.query_weight = _empty_weight(head_dim, build, zero_centered)
        self.key_weight = torch.empty_like(self.query_weight)
        self._zero_centered = zero_centered
        self.eps = eps

    def slots(self, query_name: str, key_name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        weights = {query_name: self.query_weight, key_name: self.key_weight}
        return {
            f"{name}.weight": Slot(tuple(weight.shape), _loader(weight, self._zero_centered))
            for name, weight in weights.items()
        }


def _empty_weight(size: int, build: Build, zero_centered: bool) -> Tensor:
    dtype = torch.float32 if zero_centered else build.dtype
    return torch.empty(size, dtype=dtype, device=build.device)


def _loader(weight: Tensor, zero_centered: bool) -> Callable[[Tensor], object]:
    return (lambda tensor: weight.copy_(1 + tensor.float())) if zero_centered else weight.copy_
