"""What LoRA adapters add to a product: y += B A x, each token with its own adapter's A and B.

Several adapters are in one call (arXiv 2310.18547, 2311.03285). Owns how their matrices are kept.
Knows neither files nor which projection of a model a product is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from octavo.kernels import triton_support
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.linear import LINEAR

MOST_ROWS = 256  # that the reference multiplies at once, so that it holds little beside y


@dataclass(frozen=True, slots=True)
class LoRAShape:
    """Of one product, and of the adapters that there is room for."""

    num_slots: int
    rank: int  # of each slot; what smaller adapters leave is 0
    parts: tuple[int, ...]  # outputs of each part, which has an A of its own; together N
    in_features: int  # K

    @property
    def out_features(self) -> int:
        """N."""
        return sum(self.parts)

    def check_placed(self, a: Tensor, b: Tensor) -> None:
        """Raise `ValueError` where these are no adapter's matrices."""
        wanted = (len(self.parts), self.rank, self.in_features), (self.out_features, self.rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise ValueError(f"lora: A and B are {wanted}, given {a.shape} and {b.shape}")


B = TypeVar("B")  # the slots of one product, as an implementation keeps them
G = TypeVar("G")  # the tokens of a step by adapter, as it wants them


class LoRA(Protocol[B, G]):
    """What layers call: `allocate` and `place` seldom, `group` once a step, `add` in each layer."""

    def allocate(self, shape: LoRAShape, case: Case) -> B:
        """Slots that add nothing yet."""
        ...

    def place(self, slots: B, slot: int, a: Tensor, b: Tensor) -> None:
        """Put an adapter into a slot: a [P, R, K] and b [N, R], scaled, on any device."""
        ...

    def group(self, adapters: Tensor, num_slots: int) -> G:
        """adapters [T] int32, a slot for each token or -1 -> the tokens of each slot."""
        ...

    def add(self, y: Tensor, x: Tensor, slots: B, groups: G) -> None:
        """y [T, N] += B A x for x [T, K]; rows of tokens without an adapter stay as they are."""
        ...


class PreparedSlots:
    """One pair of weights a slot, laid out as `LINEAR` wants them: A of all parts, B of each."""

    def __init__(self, shape: LoRAShape, case: Case):
        self.shape, self._case = shape, case
        sizes = {"in_features": shape.in_features, "out_features": shape.out_features}
        self.linear: Any = LINEAR.select(Case(case.device, case.dtype, {**case.sizes, **sizes}))
        self.linear = self.linear.function
        like = torch.empty(0, dtype=case.dtype, device=case.device)
        a = like.new_zeros(len(shape.parts), shape.rank, shape.in_features)
        b = like.new_zeros(shape.out_features, shape.rank)
        self.pairs = [self.prepared(a.clone(), b.clone()) for _ in range(shape.num_slots)]

    def prepared(self, a: Tensor, b: Tensor) -> tuple[Any, list[Any]]:
        """a [P, R, K] and b [N, R], laid out."""
        a, b = (tensor.to(self._case.device, self._case.dtype) for tensor in (a, b))
        of_parts = [self.linear.prepare(part.clone()) for part in b.split(self.shape.parts)]
        return self.linear.prepare(a.flatten(0, 1)), of_parts


class ReferenceLoRA:
    """One adapter after the other. On a GPU the host waits to learn which there are.

    With the products of `LINEAR` on a CPU, it promises what they do: a row's bits are its own.
    """

    def allocate(self, shape: LoRAShape, case: Case) -> PreparedSlots:
        return PreparedSlots(shape, case)

    def place(self, slots: PreparedSlots, slot: int, a: Tensor, b: Tensor) -> None:
        slots.shape.check_placed(a, b)
        slots.pairs[slot] = slots.prepared(a.contiguous(), b)

    def group(self, adapters: Tensor, num_slots: int) -> list[tuple[int, Tensor]]:
        """(slot, its tokens) for each slot that has some."""
        found = [slot for slot in adapters.unique().tolist() if slot >= 0]
        return [(slot, torch.where(adapters == slot)[0]) for slot in found]

    def add(
        self, y: Tensor, x: Tensor, slots: PreparedSlots, groups: list[tuple[int, Tensor]]
    ) -> None:
        linear, rank = slots.linear, slots.shape.rank
        for slot, tokens in groups:
            a, of_parts = slots.pairs[slot]
            for rows in tokens.split(MOST_ROWS):
                shrunk = linear.apply(x[rows], a, None).split(rank, 1)
                made = [linear.apply(s, b, None) for s, b in zip(shrunk, of_parts, strict=True)]
                y.index_add_(0, rows, torch.cat(made, 1))


LORA: Op[LoRA[Any, Any]] = Op("lora", ReferenceLoRA())
LORA.register_module("triton", "octavo.kernels.triton_lora:TRITON_LORA", triton_support.unsupported)
