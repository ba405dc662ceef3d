"""Rotary position embedding of queries and keys, in place.

Owns the half-rotation ("NeoX") form: element i turns together with element i + D/2. Does not know
how the table of angles was made (plain, scaled, YaRN): that is the layer's.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.dispatch import Op


class Rotary(Protocol):
    def __call__(self, query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotates query [T, Hq, D] and key [T, Hkv, D] in place.

        Both may be strided views into one fused qkv tensor. positions [T] int64 selects rows of
        cos_sin [max_positions, D] fp32: D/2 cosines, then D/2 sines.
        """
        ...


def reference_rotary(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # each [T, 1, D/2]
    for heads in (query, key):
        first, second = heads.float().chunk(2, dim=-1)  # each [T, heads, D/2]
        # Both halves before either is written: in fp32 they are views of what is overwritten.
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        heads.copy_(turned)


ROTARY: Op[Rotary] = Op("rotary", reference_rotary)
