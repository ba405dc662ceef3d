"""Matrix products that carry sharding and weight formats, so that models need not.

Knows neither requests nor what its parts mean to a model.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.errors import IntegrityError
from octavo.kernels import Choice
from octavo.layers.build import Build, Layer
from octavo.layers.slot import Slot
from octavo.quant import StoredWeight


class Linear(Layer):
    """y = x Wᵀ + b, where W stacks one or several named parts (q, k and v, say) along its rows.

    `split` says what a tensor-parallel rank holds: "rows" of each part (its outputs are this
    rank's), "columns" (its outputs are partial sums, added up over the group), or None (all).
    """

    def __init__(
        self,
        parts: Mapping[str, int],
        in_features: int,
        build: Build,
        *,
        bias: bool = False,
        split: str | None = None,
    ):
        super().__init__()
        self._parts = dict(parts)
        self._full_in_features = in_features
        self._split = split
        self._group = build.group
        self._columns = slice(0, in_features)
        if split == "columns":
            self._columns = build.group.share(in_features, "input features")
        self._shares = {name: self._share(name, rows) for name, rows in parts.items()}
        self.out_features = sum(share.stop - share.start for share in self._shares.values())
        self.weight: StoredWeight = build.weight(
            self.out_features, self._columns.stop - self._columns.start
        )
        self.bias = (
            torch.empty(self.out_features, dtype=build.dtype, device=build.device) if bias else None
        )

    def _share(self, name: str, rows: int) -> slice:
        return (
            self._group.share(rows, f"rows of {name}") if self._split == "rows" else slice(0, rows)
        )

    def _place_of(self, part: str) -> slice:
        """The rows of this rank's stacked weight that belong to a part."""
        start = 0
        for name, share in self._shares.items():
            size = share.stop - share.start
            if name == part:
                return slice(start, start + size)
            start += size
        raise KeyError(part)

    def slots(self, names: Mapping[str, str]) -> dict[str, Slot]:
        """The table of checkpoint tensors, given the checkpoint's name of each part."""
        table = {}
        for part, name in names.items():
            rows = self._parts[part]
            shape, load = (rows, self._full_in_features), self._weight_loader(part)
            table[f"{name}.weight"] = Slot(shape, load, self, partial(_one_part, part))
            if self.bias is not None:
                table[f"{name}.bias"] = Slot((rows,), self._bias_loader(self.bias, part))
        return table

    def fused_slots(
        self, name: str, *, groups: int = 1, transposed: bool = False
    ) -> dict[str, Slot]:
        """The table of checkpoint tensors where one tensor holds all parts.

        Args:
            name: the checkpoint's name of the tensor.
            groups: how often the parts alternate in its rows, with an equal share of each part
                every time: 1 where they are stacked whole, or the number of heads (GPT-NeoX).
            transposed: it is stored as [in_features, rows] (GPT-2's Conv1D).
        """
        sizes = [rows // groups for rows in self._parts.values()]
        num_rows, width = sum(self._parts.values()), self._full_in_features

        def rows_of_parts(tensor: Tensor) -> dict[str, Tensor]:
            pieces = torch.split(tensor.reshape(groups, -1, *tensor.shape[1:]), sizes, 1)
            return {
                part: piece.flatten(0, 1) for part, piece in zip(self._parts, pieces, strict=True)
            }

        def load_each(loaders: list[Callable[[Tensor], None]], tensor: Tensor) -> None:
            for load, rows in zip(loaders, rows_of_parts(tensor).values(), strict=True):
                load(rows)

        def load_weight(tensor: Tensor) -> None:
            rows = tensor.t() if transposed else tensor
            load_each([self._weight_loader(part) for part in self._parts], rows)

        shape = (width, num_rows) if transposed else (num_rows, width)
        slot = Slot(shape, load_weight, self, rows_of_parts, transposed)
        table = {f"{name}.weight": slot}
        bias = self.bias
        if bias is not None:
            loaders = [self._bias_loader(bias, part) for part in self._parts]
            table[f"{name}.bias"] = Slot((num_rows,), partial(load_each, loaders))
        return table

    def _weight_loader(self, part: str) -> Callable[[Tensor], None]:
        share, place = self._shares[part], self._place_of(part)
        return lambda tensor: self.weight.place(place, tensor[share, self._columns])

    def _bias_loader(self, bias: Tensor, part: str) -> Callable[[Tensor], None]:
        share, place = self._shares[part], self._place_of(part)

        def load(tensor: Tensor) -> None:
            # Partial sums are added up over the ranks: the bias must come in once.
            once = self._split != "columns" or self._group.rank == 0
            bias[place].copy_(tensor[share] if once else torch.zeros_like(tensor[share]))

        return load

    @property
    def local_parts(self) -> tuple[int, ...]:
        """This rank's outputs of each part, in their order."""
        return tuple(share.stop - share.start for share in self._shares.values())

    @property
    def local_in_features(self) -> int:
        """The input features that this rank's weight reads."""
        return self._columns.stop - self._columns.start

    def adapter(
        self, rank: int, matrices: Iterable[tuple[Slot, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """This rank's A [parts, rank, columns] and B [rows, rank] of one LoRA adapter.

        Args:
            rank: that there is room for; what the adapter's own leaves is 0.
            matrices: (a slot of this layer, A [r, in_features], B [its rows, r]) for each of its
                checkpoint tensors that the adapter changes.
        """
        names = list(self._parts)
        a = torch.zeros(len(names), rank, self.local_in_features)
        b = torch.zeros(self.out_features, rank)
        for slot, shrink, expand in matrices:
            if slot.rows_of_parts is None:
                raise IntegrityError("an adapter changes a tensor that is no product's")
            r = len(shrink)
            for part, rows in slot.rows_of_parts(expand).items():
                a[names.index(part), :r] = shrink[:, self._columns]
                b[self._place_of(part), :r] = rows[self._shares[part]]
        return a, b

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self.weight.finish(),)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""
        y = self.weight.apply(x, self.bias)
        return self._group.all_reduce(y) if self._split == "columns" else y


def _one_part(part: str, tensor: Tensor) -> dict[str, Tensor]:
    return {part: tensor}
