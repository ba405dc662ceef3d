"""Random weights, for measuring speed and for tests without a checkpoint."""

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from octavo.layers import Slot

STD = 0.02  # the usual `initializer_range`


def dummy_tensors(
    table: Mapping[str, Slot],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """A random tensor for every slot: matrices are normal, norms are one, biases are zero.

    Each tensor depends on `seed`, its name, its shape and the kind of `device`, not on its
    neighbours: models that differ in one layer agree in all others.
    """
    for name, slot in table.items():
        if len(slot.shape) > 1:
            generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(name.encode()))
            numbers = torch.empty(slot.shape, dtype=torch.float32, device=device)
            yield name, numbers.normal_(std=STD, generator=generator).to(dtype)
        else:
            value = 0.0 if name.endswith(".bias") else 1.0
            yield name, torch.full(slot.shape, value, dtype=dtype, device=device)
