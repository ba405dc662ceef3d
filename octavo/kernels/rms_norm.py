"""Root-mean-square normalisation, with the residual addition that comes before it.

Owns the op and its launcher. Does not know where in a layer the norm stands.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

MAX_TRITON_WIDTH = 65_536  # a row stays in the registers of one program


class RmsNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] of one dtype and weight [H] -> (normed [T, H], h [T, H]).

        h = x + residual rounded to the dtype (x itself without a residual). The norm of h is taken
        in fp32. With a weight of the same dtype it is rounded, then multiplied by the weight: the
        order of transformers' LlamaRMSNorm. With a weight in fp32 it is multiplied, then rounded:
        the order of transformers' Gemma2RMSNorm. So both round as they do there. The memory of
        `residual` may be reused for the returned h.
        """
        ...


def reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else x + residual
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype is not x.dtype:
        return (normed * weight).to(x.dtype), hidden
    return weight * normed.to(x.dtype), hidden


def native_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As RmsNorm; rows of x may be strided, and h is written over `residual`."""
    rows, width = x.shape
    row_stride, dense = x.stride()
    if dense != 1 or weight.shape != (width,) or not weight.is_contiguous():
        raise refuse("rms_norm", "x is [T, H] with dense rows, weight [H]", x=x, weight=weight)
    has_wide_weight = weight.dtype is not x.dtype
    if has_wide_weight and weight.dtype is not torch.float32:
        raise refuse("rms_norm", "one dtype throughout, or a weight in fp32", x=x, weight=weight)
    if residual is not None and not (
        residual.shape == x.shape and residual.is_contiguous() and residual.dtype is x.dtype
    ):
        raise refuse("rms_norm", "residual is like x, contiguous", x=x, residual=residual)
    normed = x.new_empty(rows, width)
    native.library().rms_norm[x.dtype](
        x.data_ptr(),
        row_stride,
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        rows,
        width,
        eps,
        has_wide_weight,
        torch.get_num_threads(),
    )
    return normed, x if residual is None else residual


def _unsupported_by_triton(case: Case) -> str | None:
    if case.sizes.get("size", 1) > MAX_TRITON_WIDTH:
        return f"made for rows of at most {MAX_TRITON_WIDTH:,}, not {case.sizes['size']:,}"
    return unsupported_by_triton(case)


RMS_NORM: Op[RmsNorm] = Op("rms_norm", reference_rms_norm)
RMS_NORM.register("native", native_rms_norm, unsupported)
RMS_NORM.register_module(
    "triton", "octavo.kernels.triton_rms_norm:triton_rms_norm", _unsupported_by_triton
)
