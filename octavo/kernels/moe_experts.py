"""The experts of a mixture: each token through its own few, and the results added up.

Owns how the experts' weights are laid out and multiplied. Does not know how experts are chosen.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import native, triton_support
from octavo.kernels.dispatch import Op
from octavo.kernels.gated_activations import native_silu_mul, reference_silu_mul
from octavo.kernels.linear import DEPTH_STEP, PackedWeight
from octavo.kernels.native import support

P = TypeVar("P")


class MoEExperts(Protocol, Generic[P]):
    """What a layer calls. The weights handed to `prepare` may be dropped afterwards."""

    def prepare(self, gate_up: Tensor, down: Tensor) -> P:
        """gate_up [E, 2I, H] (the gate's rows first), down [E, H, I] -> this layout."""
        ...

    def apply(self, x: Tensor, prepared: P, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, H], weights [T, k] fp32, experts [T, k] int32 (all of a row differ) -> [T, H].

        A token's result is the sum over its experts of weight * down(silu(gate(x)) * up(x)), in
        x's dtype, with sums in fp32 in an order that is the token's own.
        """
        ...


class PlainExperts:
    """The reference's layout: the tensors themselves."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.gate_up, self.down = gate_up, down


class ReferenceMoEExperts:
    """One expert after the other. On a GPU the host waits to learn which were chosen."""

    def prepare(self, gate_up: Tensor, down: Tensor) -> PlainExperts:
        return PlainExperts(gate_up, down)

    def apply(self, x: Tensor, prepared: PlainExperts, weights: Tensor, experts: Tensor) -> Tensor:
        out = x.new_zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            tokens, ranks = torch.where(experts == expert)
            inner = reference_silu_mul(functional.linear(x[tokens], prepared.gate_up[expert]))
            made = functional.linear(inner, prepared.down[expert])
            out.index_add_(0, tokens, made * weights[tokens, ranks, None])
        return out.to(x.dtype)


class PackedExperts:
    """Each expert's two weights, packed as those of `LINEAR` are on the CPU."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.gate_up = tuple(map(PackedWeight, gate_up))
        self.down = tuple(map(PackedWeight, down))


class NativeMoEExperts:
    """On the CPU: tokens sorted by expert, and for each chosen expert two products of its rows.

    A row of the result has the same bits whatever rows are beside it, and however many.
    """

    def prepare(self, gate_up: Tensor, down: Tensor) -> PackedExperts:
        check_experts(gate_up, down, tuple(DEPTH_STEP))
        return PackedExperts(gate_up, down)

    def apply(self, x: Tensor, prepared: PackedExperts, weights: Tensor, experts: Tensor) -> Tensor:
        check_routed(x, prepared.gate_up[0].in_features, prepared.down[0].dtype, weights, experts)
        (num_tokens, num_ranks), flat = experts.shape, experts.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(prepared.down)).tolist()
        inner = self._inner(x[order // num_ranks], prepared, counts)
        made = inner.new_empty(len(order), prepared.down[0].out_features)
        _multiply_each(inner, prepared.down, counts, made)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        place = place.view(num_tokens, num_ranks)
        out = x.new_zeros(x.shape, dtype=torch.float32)
        for rank in range(num_ranks):
            out.addcmul_(made[place[:, rank]].float(), weights[:, rank, None])
        return out.to(x.dtype)

    def _inner(self, rows: Tensor, prepared: PackedExperts, counts: list[int]) -> Tensor:
        """rows [P, H], sorted by expert -> silu(gate) * up, [P, I]."""
        both = rows.new_empty(len(rows), prepared.gate_up[0].out_features)
        _multiply_each(rows, prepared.gate_up, counts, both)
        del rows
        return native_silu_mul(both)


def _multiply_each(
    rows: Tensor, packed: tuple[PackedWeight, ...], counts: list[int], out: Tensor
) -> None:
    """out [P, N] = the first counts[0] of rows [P, K] by the first weight, and so on."""
    multiply, num_threads = native.library().linear[rows.dtype], torch.get_num_threads()
    (_, width), outputs, size = rows.shape, out.shape[1], rows.element_size()
    source, target = rows.data_ptr(), out.data_ptr()
    for weight, count in zip(packed, counts, strict=True):
        if count:
            multiply(
                *(source, width, weight.pointer, 0, target),
                *(count, outputs, width, weight.depth, num_threads),
            )
            source += count * width * size
            target += count * outputs * size


def check_experts(gate_up: Tensor, down: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse weights that are no experts' of one of these dtypes."""
    if (
        gate_up.dim() != 3
        or gate_up.shape[1] % 2
        or down.shape != (len(gate_up), gate_up.shape[2], gate_up.shape[1] // 2)
        or gate_up.dtype is not down.dtype
        or gate_up.dtype not in dtypes
    ):
        rule = "gate_up is [E, 2I, H] and down [E, H, I], in one dtype that is supported"
        raise support.refuse("moe_experts", rule, gate_up=gate_up, down=down)


def check_routed(
    x: Tensor, width: int, dtype: torch.dtype, weights: Tensor, experts: Tensor
) -> None:
    """Refuse what a kernel would misread."""
    if x.shape[1] != width or x.dtype is not dtype or x.stride(1) != 1:
        raise support.refuse("moe_experts", f"x is [T, {width}] {dtype} with dense rows", x=x)
    routed = weights.shape == experts.shape == (len(x), experts.shape[1])
    right = weights.dtype is torch.float32 and experts.dtype is torch.int32
    if not (routed and right and weights.is_contiguous() and experts.is_contiguous()):
        rule = "weights [T, k] fp32 and experts [T, k] int32, contiguous"
        raise support.refuse("moe_experts", rule, x=x, weights=weights, experts=experts)


MOE_EXPERTS: Op[MoEExperts] = Op("moe_experts", ReferenceMoEExperts())
MOE_EXPERTS.register("native", NativeMoEExperts(), support.unsupported)
MOE_EXPERTS.register_module(
    "triton", "octavo.kernels.triton_moe_experts:EXPERTS", triton_support.unsupported
)
