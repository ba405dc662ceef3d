"""The contract between a layer that waits for weights and whoever has them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one checkpoint tensor.

    A model offers a table {checkpoint name: Slot}; the loader checks every tensor against `shape`
    and hands it over once. What becomes of it (cut to a shard, stacked with its neighbours, packed
    for a kernel) is the layer's business.
    """

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
