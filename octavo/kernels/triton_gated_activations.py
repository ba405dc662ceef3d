"""The gate of a gated MLP in Triton, by silu or gelu: each program makes one stretch of one row.

Owns the width of a stretch. Does not know the projections on either side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

STRETCH = 1024


def triton_silu_mul(x: Tensor) -> Tensor:
    """As GatedActivation, by silu; rows of x may be strided. Rounds once, the reference twice."""
    return _gated("silu_mul", x, is_gelu=False)


def triton_gelu_tanh_mul(x: Tensor) -> Tensor:
    """As GatedActivation, by gelu; rows of x may be strided. Rounds once, the reference twice."""
    return _gated("gelu_tanh_mul", x, is_gelu=True)


def _gated(op: str, x: Tensor, *, is_gelu: bool) -> Tensor:
    rows, double_width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or double_width % 2:
        raise refuse(op, "x is [T, 2I] with dense rows", x=x)
    width = double_width // 2
    out = x.new_empty(rows, width)
    if rows and width:
        stretches, constants = _constants(width, is_gelu)
        launch(_gate, (rows, stretches))(x, out, row_stride, **constants)
    return out


@cache
def _constants(width: int, is_gelu: bool) -> tuple[int, dict[str, Any]]:
    """(stretches in a row, keywords of the launch)"""
    stretch = min(STRETCH, triton.next_power_of_2(width))
    sizes = {"WIDTH": width, "STRETCH": stretch, "num_warps": max(1, stretch // 256)}
    return triton.cdiv(width, stretch), {"GELU": is_gelu, **sizes, **launch_options()}


@triton.jit
def _gate(
    x,
    out,
    row_stride,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    STRETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    there = column < WIDTH
    gate = tl.load(x + row * row_stride + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * row_stride + WIDTH + column, mask=there, other=0.0).to(tl.float32)
    slope = gate
    if GELU:  # gelu by tanh(u) is x / (1 + e^-2u)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gated = gate / (1.0 + tl.exp(-slope)) * up
    tl.store(out + row * WIDTH + column, gated.to(out.dtype.element_ty), mask=there)
