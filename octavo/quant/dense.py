"""How a weight is stored and multiplied: the seam, and its plainest side. Knows no models.

A `WeightFormat` makes one `StoredWeight` for each linear layer. Checkpoint tensors are placed into
it part by part; `finish` turns it into whatever the chosen kernel wants.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.errors import IntegrityError
from octavo.kernels import LINEAR, MOE_EXPERTS, Case, Choice, PreparedWeight


class StoredWeight(Protocol):
    """One weight matrix of `out_features` rows, in some format."""

    @property
    def plain(self) -> Tensor | None:
        """[out_features, in_features], for kernels that want it so; None where it is not kept."""
        ...

    def place(self, rows: slice, tensor: Tensor) -> None:
        """Store plain checkpoint values [len(rows), in_features] as these rows."""
        ...

    def finish(self) -> Choice[Any]:
        """All rows are there: lay the weight out for the kernel, and say which kernel it is."""
        ...

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in_features] -> [T, out_features]. After `finish` only."""
        ...

    def gather_rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the plain weight, [T, in_features]. After `finish` only."""
        ...


class StoredExperts(Protocol):
    """The weights of a mixture's experts, E times [2I, H] and [H, I], in some format."""

    def place_gate_up(self, expert: int, rows: slice, tensor: Tensor) -> None:
        """Store plain checkpoint values [len(rows), H] as these rows of gate and up, stacked."""
        ...

    def place_down(self, expert: int, tensor: Tensor) -> None:
        """Store plain checkpoint values [H, I]."""
        ...

    def finish(self) -> Choice[Any]:
        """As StoredWeight."""
        ...

    def apply(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As `octavo.kernels.MOE_EXPERTS`. After `finish` only."""
        ...


class WeightFormat(Protocol):
    """Makes the storage of weights."""

    name: str

    def create(self, case: Case) -> StoredWeight:
        """Storage for a weight of `case.sizes`' out_features rows of in_features numbers."""
        ...

    def create_experts(self, case: Case) -> StoredExperts:
        """Storage for `case.sizes`' num_experts, of in_features (H) and size (I) numbers."""
        ...


class DenseWeight:
    """Every value as it is, in the model's dtype."""

    def __init__(self, case: Case):
        self._choice = LINEAR.select(case)
        self._kernel = self._choice.function
        shape = case.sizes["out_features"], case.sizes["in_features"]
        self._loading: Tensor | None = torch.empty(shape, dtype=case.dtype, device=case.device)
        self._prepared: PreparedWeight | None = None

    @property
    def plain(self) -> Tensor | None:
        """As StoredWeight. Before `finish`, None."""
        return None if self._prepared is None else self._prepared.plain

    def place(self, rows: slice, tensor: Tensor) -> None:
        if self._loading is None:
            raise IntegrityError("a weight was placed after its layer was finished")
        self._loading[rows].copy_(tensor)

    def finish(self) -> Choice[Any]:
        if self._loading is not None:
            self._prepared = self._kernel.prepare(self._loading)
            self._loading = None
        return self._choice

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernel.apply(x, self._prepared, bias)

    def gather_rows(self, ids: Tensor) -> Tensor:
        return self._kernel.gather_rows(self._prepared, ids)


class DenseExperts:
    """Every value as it is, in the model's dtype."""

    def __init__(self, case: Case):
        self._choice = MOE_EXPERTS.select(case)
        self._kernel = self._choice.function
        sizes = case.sizes
        num_experts, width, size = sizes["num_experts"], sizes["in_features"], sizes["size"]
        like = torch.empty(0, dtype=case.dtype, device=case.device)
        self._loading: tuple[Tensor, Tensor] | None = (
            like.new_empty(num_experts, 2 * size, width),
            like.new_empty(num_experts, width, size),
        )
        self._prepared: Any = None

    def place_gate_up(self, expert: int, rows: slice, tensor: Tensor) -> None:
        self._tensors()[0][expert, rows].copy_(tensor)

    def place_down(self, expert: int, tensor: Tensor) -> None:
        self._tensors()[1][expert].copy_(tensor)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._loading is None:
            raise IntegrityError("an expert's weight was placed after its layer was finished")
        return self._loading

    def finish(self) -> Choice[Any]:
        if self._loading is not None:
            self._prepared = self._kernel.prepare(*self._loading)
            self._loading = None
        return self._choice

    def apply(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        made: Tensor = self._kernel.apply(x, self._prepared, weights, experts)
        return made


class DenseFormat:
    """Weights in the model's dtype, multiplied as they are."""

    name = "dense"

    def create(self, case: Case) -> DenseWeight:
        """As WeightFormat."""
        return DenseWeight(case)

    def create_experts(self, case: Case) -> DenseExperts:
        """As WeightFormat."""
        return DenseExperts(case)
