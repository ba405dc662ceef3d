"""Layer normalisation in Triton: one program for a row, which it reads once.

Does not know the residual stream beyond one addition.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.layer_norm import MAX_TRITON_WIDTH
from octavo.kernels.triton_launch import allow_next, launch, wait_for_inputs
from octavo.kernels.triton_rms_norm import row_constants
from octavo.kernels.triton_support import refuse


def triton_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As LayerNorm; rows of x may be strided, and h is written over `residual`."""
    rows, width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or not (weight.shape == bias.shape == (width,)):
        rule = "x is [T, H] with dense rows, weight and bias [H]"
        raise refuse("layer_norm", rule, x=x, weight=weight, bias=bias)
    if not (weight.is_contiguous() and bias.is_contiguous()) or width > MAX_TRITON_WIDTH:
        rule = f"weight and bias are contiguous, rows of at most {MAX_TRITON_WIDTH:,}"
        raise refuse("layer_norm", rule, x=x, weight=weight, bias=bias)
    if not (weight.dtype is bias.dtype is x.dtype):
        raise refuse("layer_norm", "one dtype throughout", x=x, weight=weight, bias=bias)
    hidden = x if residual is None else residual
    if residual is not None and not (
        residual.shape == x.shape and residual.is_contiguous() and residual.dtype is x.dtype
    ):
        raise refuse("layer_norm", "residual is like x, contiguous", x=x, residual=residual)
    normed = x.new_empty(rows, width)
    if rows:
        constants = row_constants(width, residual is not None)
        launch(_layer_norm, (rows,))(x, hidden, weight, bias, normed, row_stride, eps, **constants)
    return normed, hidden


@triton.jit
def _layer_norm(
    x,
    residual,
    weight,
    bias,
    normed,
    row_stride,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    there = column < WIDTH
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)  # no kernel writes them
    shift = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    hidden = tl.load(x + row * row_stride + column, mask=there, other=0.0)
    if HAS_RESIDUAL:
        stream = residual + row * WIDTH + column
        wide = hidden.to(tl.float32) + tl.load(stream, mask=there, other=0.0).to(tl.float32)
        hidden = wide.to(hidden.dtype)
        tl.store(stream, hidden, mask=there)
    wide = hidden.to(tl.float32)
    # Two passes over registers: the variance of numbers far from 0 survives.
    centred = tl.where(there, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    unit = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(normed + row * WIDTH + column, (unit * scale + shift).to(hidden.dtype), mask=there)
