"""Layer normalisation, with the residual addition that comes before it.

Owns the op. Torch's own CPU kernel does a row in one pass, so there is no compiled version beside
it. Does not know where in a layer the norm stands.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels.dispatch import Case, Op
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

MAX_TRITON_WIDTH = 65_536  # a row stays in the registers of one program


class LayerNorm(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, H], weight and bias [H], one dtype -> (normed [T, H], h [T, H]).

        h = x + residual rounded to the dtype (x itself without a residual). Its norm
        (arXiv 1607.06450, eq. 4) times weight, plus bias, is taken in fp32 and rounded once. The
        memory of `residual` is reused for the returned h.
        """
        ...


def reference_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else residual.add_(x)
    return functional.layer_norm(hidden, weight.shape, weight, bias, eps), hidden


def _unsupported_by_triton(case: Case) -> str | None:
    if case.sizes.get("size", 1) > MAX_TRITON_WIDTH:
        return f"made for rows of at most {MAX_TRITON_WIDTH:,}, not {case.sizes['size']:,}"
    return unsupported_by_triton(case)


LAYER_NORM: Op[LayerNorm] = Op("layer_norm", reference_layer_norm)
LAYER_NORM.register_module(
    "triton", "octavo.kernels.triton_layer_norm:triton_layer_norm", _unsupported_by_triton
)
