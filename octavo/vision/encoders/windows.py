"""Where the patches of Qwen2.5-VL's tower stand: their windows, frames and angles.

Patches come with the `merge_size` by `merge_size` neighbours of one merged token, a unit, together.
Index arithmetic on the host; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from octavo.config.families.vision_shapes import Qwen25VisionConfig
from octavo.kernels import Segments

Grid = tuple[int, int, int]  # (frames, rows, columns) of patches


@dataclass(frozen=True, slots=True)
class PatchLayout:
    """The order in which the tower runs the patches of all its images, window by window."""

    units: Tensor  # [U] int64: the unit that comes i-th
    back: Tensor  # [U] int64: where each unit went
    windows: Segments
    frames: Segments
    cos_sin: tuple[Tensor, Tensor]  # [patches, 1, head_dim / 2] fp32 each, in that order

    @classmethod
    def of(cls, grids: Sequence[Grid], config: Qwen25VisionConfig, device: str) -> Self:
        """The layout of images and videos, one after the other."""
        merge, num_units = config.merge_size, 0
        orders, window_lengths, frame_lengths, places = [], [], [], []
        for frames, rows, columns in grids:
            order, lengths = window_order((frames, rows // merge, columns // merge), config)
            orders.append(order + num_units)
            window_lengths += (lengths * merge**2).tolist()
            frame_lengths += [rows * columns] * frames
            places.append(np.tile(_places(rows, columns, merge), (frames, 1)))
            num_units += len(order)
        units = torch.from_numpy(np.concatenate(orders))
        place = torch.from_numpy(np.concatenate(places)).view(-1, merge**2, 2)
        exponents = torch.arange(0, config.head_dim // 2, 2).float() / (config.head_dim // 2)
        frequencies = 1.0 / config.rope_theta**exponents
        # Half of the pairs turn with the row, half with the column: [patches, 1, head_dim / 2]
        angles = (place[units].flatten(0, 1)[..., None].float() * frequencies).flatten(1)[:, None]
        return cls(
            units.to(device),
            torch.argsort(units).to(device),
            Segments.of(window_lengths, device),
            Segments.of(frame_lengths, device),
            (angles.cos().to(device), angles.sin().to(device)),
        )

    def rotated(self, heads: Tensor) -> Tensor:
        """heads [patches, H, D] of queries or keys -> turned by row and column, in fp32."""
        first, second = heads.float().chunk(2, dim=-1)
        cos, sin = self.cos_sin
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, dim=-1).to(heads.dtype)


def window_order(
    grid: Grid, config: Qwen25VisionConfig
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The units of one image by windows, and the units in each window (arXiv 2502.13923, 2.1.1).

    Windows go frame by frame, row by row; those at the lower and right borders hold fewer units.
    """
    side = config.window_units
    frame, row, column = (axis.ravel() for axis in np.indices(grid))
    down, across = -(-grid[1] // side), -(-grid[2] // side)
    window = (frame * down + row // side) * across + column // side
    return np.argsort(window, kind="stable"), np.bincount(window)


def _places(rows: int, columns: int, merge: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(row, column) of each patch of a frame, units together: [rows * columns, 2]"""
    blocks = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
