"""The contract between a layer that waits for weights and whoever has them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from octavo.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one checkpoint tensor.

    A model offers a table {checkpoint name: Slot}; the loader checks every tensor against `shape`
    and hands it over once. What becomes of it (cut to a shard, stacked with its neighbours, packed
    for a kernel) is the layer's business.
    """

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
    # Of a weight of a product, for whoever changes it besides loading it: the layer, and a matrix
    # with as many rows as the product has outputs -> the rows of each of its parts.
    linear: "Linear | None" = None
    rows_of_parts: Callable[[Tensor], Mapping[str, Tensor]] | None = None
    transposed: bool = False  # the checkpoint has it as [columns, rows]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of a weight."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)
