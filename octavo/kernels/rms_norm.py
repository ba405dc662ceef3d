"""Root-mean-square normalisation, with the residual addition that comes before it.

Owns the op and its launcher. Does not know where in a layer the norm stands.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.dispatch import Op


class RmsNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] and weight [H], one dtype -> (normed [T, H], h [T, H]).

        h = x + residual rounded to the dtype (x itself without a residual). The norm of h is taken
        in fp32, rounded, then multiplied by the weight: the order of transformers' LlamaRMSNorm, so
        that both round alike. The memory of `residual` may be reused for the returned h.
        """
        ...


def reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else x + residual
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), hidden


RMS_NORM: Op[RmsNorm] = Op("rms_norm", reference_rms_norm)
