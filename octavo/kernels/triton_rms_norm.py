"""RMS normalisation in Triton: one program for a row, which it reads once.

Owns the choice of warps. Does not know the residual stream beyond one addition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.rms_norm import MAX_TRITON_WIDTH
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse


def triton_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As RmsNorm; rows of x may be strided, and h is written over `residual`."""
    shape = x.shape
    rows, width = shape
    row_stride, dense = x.stride()
    if dense != 1 or weight.shape != shape[1:] or not weight.is_contiguous():
        raise refuse("rms_norm", "x is [T, H] with dense rows, weight [H]", x=x, weight=weight)
    if weight.dtype not in (x.dtype, torch.float32) or width > MAX_TRITON_WIDTH:
        rule = f"one dtype throughout, or a weight in fp32, rows of at most {MAX_TRITON_WIDTH:,}"
        raise refuse("rms_norm", rule, x=x, weight=weight)
    hidden = x if residual is None else residual
    if residual is not None and not (
        residual.shape == shape and residual.is_contiguous() and residual.dtype is x.dtype
    ):
        raise refuse("rms_norm", "residual is like x, contiguous", x=x, residual=residual)
    normed = x.new_empty(shape)
    if rows:
        constants = row_constants(width, residual is not None)
        launch(_rms_norm, (rows,))(x, hidden, weight, normed, row_stride, eps, **constants)
    return normed, hidden


@cache
def row_constants(width: int, has_residual: bool) -> dict[str, Any]:
    """Of a kernel that normalises a row a program."""
    padded = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "PADDED": padded,
        "HAS_RESIDUAL": has_residual,
        "num_warps": min(16, max(1, padded // 512)),
        **launch_options(),
    }


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
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
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)  # no kernel writes it
    wait_for_inputs(PDL)
    hidden = tl.load(x + row * row_stride + column, mask=there, other=0.0)
    if HAS_RESIDUAL:
        stream = residual + row * WIDTH + column
        wide = hidden.to(tl.float32) + tl.load(stream, mask=there, other=0.0).to(tl.float32)
        hidden = wide.to(hidden.dtype)
        tl.store(stream, hidden, mask=there)
    wide = hidden.to(tl.float32)
    unit = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    # Before a weight of the same dtype, not before a wider one.
    rounded = unit.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(normed + row * WIDTH + column, (rounded * scale).to(hidden.dtype), mask=there)
