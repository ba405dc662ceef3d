"""The gate of a gated MLP by gelu: gelu(gate) * up, over one tensor that holds both halves.

Owns the op and its launcher. Does not know the projections on either side of it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.activations import reference_gelu_tanh
from octavo.kernels.dispatch import Op
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


class GeluTanhMul(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 2I] -> [T, I]: gelu of the first half times the second half, in x's dtype.

        Gelu by tanh (arXiv 1606.08415, section 2): x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
        """
        ...


def reference_gelu_tanh_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return reference_gelu_tanh(gate) * up


def native_gelu_tanh_mul(x: Tensor) -> Tensor:
    """As GeluTanhMul; rows of x may be strided. Rounds once, where the reference rounds twice."""
    rows, double_width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or double_width % 2:
        raise refuse("gelu_tanh_mul", "x is [T, 2I] with dense rows", x=x)
    out = x.new_empty(rows, double_width // 2)
    native.library().gelu_tanh_mul[x.dtype](
        x.data_ptr(),
        row_stride,
        out.data_ptr(),
        rows,
        double_width // 2,
        torch.get_num_threads(),
    )
    return out


GELU_TANH_MUL: Op[GeluTanhMul] = Op("gelu_tanh_mul", reference_gelu_tanh_mul)
GELU_TANH_MUL.register("native", native_gelu_tanh_mul, unsupported)
GELU_TANH_MUL.register_module(
    "triton", "octavo.kernels.triton_silu_mul:triton_gelu_tanh_mul", unsupported_by_triton
)
