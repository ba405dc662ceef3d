"""Matrix products with a weight that is prepared once and used many times.

Owns how a plain weight is laid out for the machine. Does not know sharding, quantization, or which
projection of a model a weight is.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels.dispatch import Op


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


LINEAR: Op[Linear] = Op("linear", ReferenceLinear())
