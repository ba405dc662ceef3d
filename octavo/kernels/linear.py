"""Matrix products with a weight that is prepared once and used many times.

Owns how a plain weight is laid out for the machine. Does not know sharding, quantization, or which
projection of a model a weight is.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.native import support


class PreparedWeight(Protocol):
    """A weight as one implementation wants it; opaque to all others."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...


P = TypeVar("P", bound=PreparedWeight)


class Linear(Protocol, Generic[P]):
    """What a layer calls. The weight handed to `prepare` may be dropped afterwards."""

    def prepare(self, weight: Tensor) -> P:
        """weight [N, K] -> the same numbers in this implementation's layout."""
        ...

    def apply(self, x: Tensor, prepared: P, bias: Tensor | None) -> Tensor:
        """x [T, K] (rows may be strided), bias [N] or None -> x @ weight.T + bias, [T, N]."""
        ...

    def unpack(self, prepared: P) -> Tensor:
        """The plain weight [N, K], bit for bit what `prepare` was given."""
        ...

    def gather_rows(self, prepared: P, ids: Tensor) -> Tensor:
        """ids [T] -> rows [T, K] of the plain weight: lets a tied embedding live without a copy."""
        ...


class PlainWeight:
    """The reference's layout: the tensor itself."""

    __slots__ = ("in_features", "out_features", "weight")

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.out_features, self.in_features = weight.shape


class ReferenceLinear:
    def prepare(self, weight: Tensor) -> PlainWeight:
        return PlainWeight(weight)

    def apply(self, x: Tensor, prepared: PlainWeight, bias: Tensor | None) -> Tensor:
        return functional.linear(x, prepared.weight, bias)

    def unpack(self, prepared: PlainWeight) -> Tensor:
        return prepared.weight

    def gather_rows(self, prepared: PlainWeight, ids: Tensor) -> Tensor:
        return functional.embedding(ids, prepared.weight)


PANEL = 16  # outputs in one line of the packed layout
DEPTH_STEP = 32  # the packed depth is a multiple of it, so that no kernel meets a tail


def pack_lines(weight: Tensor) -> Tensor:
    """bf16 weight [N, K] as lines of 16 outputs by 2 inputs: [N / 16, K / 2, 16] of int32.

    Both sizes are padded with zeros; an int32 is two bf16. A line is what one AVX-512 bf16 product
    reads, and 16 lines are one AMX tile, so one copy serves every machine and number of rows.
    """
    outputs, width = weight.shape
    panels, depth = -(-outputs // PANEL), -(-width // DEPTH_STEP) * DEPTH_STEP
    if (panels * PANEL, depth) != weight.shape:
        padded = weight.new_zeros(panels * PANEL, depth)
        padded[:outputs, :width] = weight
        weight = padded
    pairs = weight.contiguous().view(torch.int32)  # [N, K / 2]
    return pairs.view(panels, PANEL, depth // 2).transpose(1, 2).contiguous()


class PackedWeight:
    """A bf16 weight as `pack_lines` lays it out."""

    __slots__ = ("depth", "in_features", "lines", "out_features", "pointer")

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        self.lines = pack_lines(weight)
        self.depth = 2 * self.lines.shape[1]
        self.pointer = self.lines.data_ptr()


class NativeLinear:
    """Linear for bf16 on the CPU, over PackedWeight. Sums are fp32, rounded once."""

    def prepare(self, weight: Tensor) -> PackedWeight:
        if weight.dim() != 2 or weight.dtype is not torch.bfloat16:
            raise support.refuse("linear", "weight is [N, K] bf16", weight=weight)
        return PackedWeight(weight)

    def apply(self, x: Tensor, prepared: PackedWeight, bias: Tensor | None) -> Tensor:
        rows, width = x.shape
        row_stride, dense = x.stride()
        outputs = prepared.out_features
        if x.dtype is not torch.bfloat16 or width != prepared.in_features or dense != 1:
            rule = f"x is [T, {prepared.in_features}] bf16 with dense rows"
            raise support.refuse("linear", rule, x=x)
        bias_pointer = 0
        if bias is not None:
            if bias.shape != (outputs,) or bias.dtype is not x.dtype or not bias.is_contiguous():
                raise support.refuse("linear", f"bias is [{outputs}] bf16", bias=bias)
            bias_pointer = bias.data_ptr()
        out = x.new_empty(rows, outputs)
        native.library().linear[torch.bfloat16](
            *(x.data_ptr(), row_stride, prepared.pointer, bias_pointer, out.data_ptr()),
            *(rows, outputs, width, prepared.depth, 0, torch.get_num_threads()),
        )
        return out

    def unpack(self, prepared: PackedWeight) -> Tensor:
        plain = prepared.lines.transpose(1, 2).contiguous().view(-1, prepared.depth // 2)
        plain = plain.view(torch.bfloat16)[: prepared.out_features, : prepared.in_features]
        return plain.contiguous()

    def gather_rows(self, prepared: PackedWeight, ids: Tensor) -> Tensor:
        rows = prepared.lines[ids // PANEL, :, ids % PANEL].contiguous()  # [T, K / 2]
        return rows.view(torch.bfloat16)[:, : prepared.in_features].contiguous()


def _unsupported(case: Case) -> str | None:
    return support.unsupported(case, dtypes=(torch.bfloat16,))


LINEAR: Op[Linear] = Op("linear", ReferenceLinear())
LINEAR.register("native", NativeLinear(), _unsupported)
