"""The first half of a gated MLP in one op: silu(x @ gate.T) * (x @ up.T).

Owns the layout in which a gate panel and its up panel lie side by side, so that the product is
finished while both are in registers. Does not know the projection that follows.
"""

from __future__ import annotations

from typing import Generic, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.linear import P, PlainWeight, pack_lines
from octavo.kernels.native import support
from octavo.kernels.silu_mul import reference_silu_mul


class LinearSiluMul(Protocol, Generic[P]):
    """What a layer calls. The weight handed to `prepare` may be dropped afterwards."""

    def prepare(self, weight: Tensor) -> P:
        """weight [2I, K]: the gate's rows, then the up projection's."""
        ...

    def apply(self, x: Tensor, prepared: P) -> Tensor:
        """x [T, K] (rows may be strided) -> [T, I]."""
        ...


class ReferenceLinearSiluMul:
    def prepare(self, weight: Tensor) -> PlainWeight:
        return PlainWeight(weight)

    def apply(self, x: Tensor, prepared: PlainWeight) -> Tensor:
        return reference_silu_mul(functional.linear(x, prepared.weight))


class GatedWeight:
    """bf16 weight [2I, K] as PackedWeight's lines, panels alternating between gate and up."""

    __slots__ = ("depth", "in_features", "lines", "out_features", "pointer")

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape[0] // 2, weight.shape[1]
        gate, up = (pack_lines(half) for half in weight.chunk(2))
        self.depth = 2 * gate.shape[1]
        self.lines = torch.stack((gate, up), dim=1)  # [I / 16, 2, K / 2, 16] of int32
        self.pointer = self.lines.data_ptr()


class NativeLinearSiluMul:
    """LinearSiluMul for bf16 on the CPU. Both products are rounded before the gate, as apart."""

    def prepare(self, weight: Tensor) -> GatedWeight:
        if weight.dim() != 2 or weight.shape[0] % 2 or weight.dtype is not torch.bfloat16:
            raise support.refuse("linear_silu_mul", "weight is [2I, K] bf16", weight=weight)
        return GatedWeight(weight)

    def apply(self, x: Tensor, prepared: GatedWeight) -> Tensor:
        rows, width = x.shape
        row_stride, dense = x.stride()
        if x.dtype is not torch.bfloat16 or width != prepared.in_features or dense != 1:
            rule = f"x is [T, {prepared.in_features}] bf16 with dense rows"
            raise support.refuse("linear_silu_mul", rule, x=x)
        outputs = prepared.out_features
        out = x.new_empty(rows, outputs)
        native.library().linear[torch.bfloat16](
            *(x.data_ptr(), row_stride, prepared.pointer, 0, out.data_ptr()),
            *(rows, outputs, width, prepared.depth, 1, torch.get_num_threads()),
        )
        return out


def _unsupported(case: Case) -> str | None:
    return support.unsupported(case, dtypes=(torch.bfloat16,))


LINEAR_SILU_MUL: Op[LinearSiluMul] = Op("linear_silu_mul", ReferenceLinearSiluMul())
LINEAR_SILU_MUL.register("native", NativeLinearSiluMul(), _unsupported)
