"""The gate of a gated MLP: f(gate) * up, over one tensor that holds both halves; f is silu or gelu.

Owns the ops and their launchers. Does not know the projections on either side of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.activations import reference_gelu_tanh
from octavo.kernels.dispatch import Op
from octavo.kernels.native.library import ByDtype
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


class GatedActivation(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 2I] -> [T, I]: f of the first half times the second half, in x's dtype.

        f is the op's: silu, or gelu by tanh (arXiv 1606.08415, section 2), which is
        x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
        """
        ...


def reference_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def reference_gelu_tanh_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return reference_gelu_tanh(gate) * up


def native_silu_mul(x: Tensor) -> Tensor:
    """As GatedActivation, by silu; rows of x may be strided. Rounds once, the reference twice."""
    return _gated(native.library().silu_mul, x)


def native_gelu_tanh_mul(x: Tensor) -> Tensor:
    """As GatedActivation, by gelu; rows of x may be strided. Rounds once, the reference twice."""
    return _gated(native.library().gelu_tanh_mul, x)


def _gated(calls: ByDtype, x: Tensor) -> Tensor:
    rows, double_width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or double_width % 2:
        raise refuse(calls.op, "x is [T, 2I] with dense rows", x=x)
    out = x.new_empty(rows, double_width // 2)
    calls[x.dtype](
        x.data_ptr(),
        row_stride,
        out.data_ptr(),
        rows,
        double_width // 2,
        torch.get_num_threads(),
    )
    return out


def _op(name: str, reference: GatedActivation, compiled: GatedActivation) -> Op[GatedActivation]:
    op = Op(name, reference)
    op.register("native", compiled, unsupported)
    target = f"octavo.kernels.triton_gated_activations:triton_{name}"
    op.register_module("triton", target, unsupported_by_triton)
    return op


SILU_MUL = _op("silu_mul", reference_silu_mul, native_silu_mul)
GELU_TANH_MUL = _op("gelu_tanh_mul", reference_gelu_tanh_mul, native_gelu_tanh_mul)
