"""The gate of a gated MLP: silu(gate) * up, over one tensor that holds both halves.

Owns the op and its launcher. Does not know the projections on either side of it.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Op
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


class SiluMul(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 2I] -> [T, I]: silu of the first half times the second half, in x's dtype."""
        ...


def reference_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def native_silu_mul(x: Tensor) -> Tensor:
    """As SiluMul; rows of x may be strided. Rounds once, where the reference rounds twice."""
    rows, double_width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or double_width % 2:
        raise refuse("silu_mul", "x is [T, 2I] with dense rows", x=x)
    out = x.new_empty(rows, double_width // 2)
    native.library().silu_mul[x.dtype](
        x.data_ptr(),
        row_stride,
        out.data_ptr(),
        rows,
        double_width // 2,
        torch.get_num_threads(),
    )
    return out


SILU_MUL: Op[SiluMul] = Op("silu_mul", reference_silu_mul)
SILU_MUL.register("native", native_silu_mul, unsupported)
SILU_MUL.register_module(
    "triton", "octavo.kernels.triton_silu_mul:triton_silu_mul", unsupported_by_triton
)
