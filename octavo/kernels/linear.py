"""Matrix products with a weight that is prepared once and used many times.

Owns how a plain weight is laid out for the machine. Does not know sharding, quantization, or which
projection of a model a weight is.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native, triton_support
from octavo.kernels.block_sizes import LEAST_SHARED_KIB, SHARED_KIB
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.native import support


class PreparedWeight(Protocol):
    """A weight as one implementation wants it; opaque to all others."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def plain(self) -> Tensor | None:
        """The weight [N, K] where it is kept as it was; None in other layouts."""
        ...


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

    __slots__ = ("in_features", "out_features", "plain")

    def __init__(self, weight: Tensor):
        self.plain = weight
        self.out_features, self.in_features = weight.shape


class ReferenceLinear:
    def prepare(self, weight: Tensor) -> PlainWeight:
        return PlainWeight(weight)

    def apply(self, x: Tensor, prepared: PlainWeight, bias: Tensor | None) -> Tensor:
        return functional.linear(x, prepared.plain, bias)

    def unpack(self, prepared: PlainWeight) -> Tensor:
        return prepared.plain

    def gather_rows(self, prepared: PlainWeight, ids: Tensor) -> Tensor:
        return functional.embedding(ids, prepared.plain)


PANEL = 16  # outputs in one line of the packed layout
# The packed depth is a multiple of it: in bf16 that of an AMX tile, so that no kernel meets a tail.
DEPTH_STEP = {torch.bfloat16: 32, torch.float32: 1}


class PackedWeight:
    """A weight [N, K] as lines of 16 outputs by one 32-bit word: one fp32, or two bf16 of one row.

    A line is what one vector product reads, and 16 lines of bf16 are one AMX tile, so one copy
    serves every machine and number of rows. Both sizes are padded with zeros.
    """

    __slots__ = ("depth", "dtype", "in_features", "lines", "out_features", "pointer")

    plain = None

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        panels, step = -(-self.out_features // PANEL), DEPTH_STEP[weight.dtype]
        self.depth = -(-self.in_features // step) * step
        if (panels * PANEL, self.depth) != weight.shape:
            padded = weight.new_zeros(panels * PANEL, self.depth)
            padded[: self.out_features, : self.in_features] = weight
            weight = padded
        words = weight.contiguous().view(torch.int32).view(panels, PANEL, -1)
        self.lines = words.transpose(1, 2).contiguous()  # [N / 16, words of a row, 16]
        self.pointer = self.lines.data_ptr()


class NativeLinear:
    """Linear on the CPU, over PackedWeight. Sums are fp32, rounded once.

    A row of the result has the same bits whatever rows are beside it, and however many.
    """

    def prepare(self, weight: Tensor) -> PackedWeight:
        if weight.dim() != 2 or weight.dtype not in DEPTH_STEP:
            raise support.refuse("linear", "weight is [N, K] bf16 or fp32", weight=weight)
        return PackedWeight(weight)

    def apply(self, x: Tensor, prepared: PackedWeight, bias: Tensor | None) -> Tensor:
        rows, width = x.shape
        row_stride, dense = x.stride()
        outputs, dtype = prepared.out_features, prepared.dtype
        if x.dtype is not dtype or width != prepared.in_features or dense != 1:
            rule = f"x is [T, {prepared.in_features}] {dtype} with dense rows"
            raise support.refuse("linear", rule, x=x)
        bias_pointer = 0
        if bias is not None:
            if bias.shape != (outputs,) or bias.dtype is not dtype or not bias.is_contiguous():
                raise support.refuse("linear", f"bias is [{outputs}] {dtype}", bias=bias)
            bias_pointer = bias.data_ptr()
        out = x.new_empty(rows, outputs)
        native.library().linear[dtype](
            *(x.data_ptr(), row_stride, prepared.pointer, bias_pointer, out.data_ptr()),
            *(rows, outputs, width, prepared.depth, torch.get_num_threads()),
        )
        return out

    def unpack(self, prepared: PackedWeight) -> Tensor:
        rows = prepared.lines.transpose(1, 2).contiguous().view(-1, prepared.lines.shape[1])
        plain = rows.view(prepared.dtype)[: prepared.out_features, : prepared.in_features]
        return plain.contiguous()

    def gather_rows(self, prepared: PackedWeight, ids: Tensor) -> Tensor:
        rows = prepared.lines[ids // PANEL, :, ids % PANEL].contiguous()  # [T, words of a row]
        return rows.view(prepared.dtype)[:, : prepared.in_features].contiguous()


INVARIANT_SHARED_KIB = 192  # its blocks are one choice for all GPUs, made for Hopper


def _unsupported_by_triton(case: Case) -> str | None:
    if (reason := triton_support.unsupported(case)) is not None:
        return reason
    if case.dtype is torch.float32:
        return "made for bfloat16 and float16; torch is as fast in float32"
    return None


def _unsupported_by_invariant(case: Case) -> str | None:
    if not case.sizes.get("batch_invariant"):
        return "batch invariance was not asked for"
    if (reason := _unsupported_by_triton(case)) is not None or not torch.cuda.is_available():
        return reason
    room = SHARED_KIB.get(torch.cuda.get_device_capability(), LEAST_SHARED_KIB)
    if room < INVARIANT_SHARED_KIB:
        return f"needs {INVARIANT_SHARED_KIB} KiB of shared memory, this GPU has {room}"
    return None


def _unsupported_by_fastest(case: Case) -> str | None:
    if case.sizes.get("batch_invariant"):
        return "its bits depend on the batch"
    return _unsupported_by_triton(case)


LINEAR: Op[Linear] = Op("linear", ReferenceLinear())
LINEAR.register("native", NativeLinear(), support.unsupported)
LINEAR.register_module(
    "triton-invariant", "octavo.kernels.triton_linear:INVARIANT", _unsupported_by_invariant
)
LINEAR.register_module("triton", "octavo.kernels.triton_linear:FASTEST", _unsupported_by_fastest)
