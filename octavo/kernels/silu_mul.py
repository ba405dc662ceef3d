"""The gate of a gated MLP: silu(gate) * up, over one tensor that holds both halves.

Owns the op and its launcher. Does not know the projections on either side of it.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels.dispatch import Op


class SiluMul(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 2I] -> [T, I]: silu of the first half times the second half, in x's dtype."""
        ...


def reference_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


SILU_MUL: Op[SiluMul] = Op("silu_mul", reference_silu_mul)
