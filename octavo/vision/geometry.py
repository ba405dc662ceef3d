"""Sizes of images, tiles, patches and tokens: arithmetic alone, for the front end as for a worker.

Sizes are (height, width).
"""

import math
from collections.abc import Sequence

from octavo.errors import InvalidImageError

Size = tuple[int, int]

MAX_ASPECT_RATIO = 200  # of Qwen2-VL


def shortest_side_size(size: Size, shortest_side: int) -> Size:
    """The size whose shorter side is that, of the same shape; the longer one is rounded down."""
    height, width = size
    if width <= height:
        return int(shortest_side * height / width), shortest_side
    return shortest_side, int(shortest_side * width / height)


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The grid that keeps most of an image's pixels, and among equals wastes the fewest of its own.

    LLaVA-NeXT's `select_best_resolution`; the first of equals.
    """
    height, width = size

    def merit(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=merit)


def size_within(size: Size, grid: Size) -> Size:
    """The largest size of the same shape inside of a grid; the shorter side is rounded up."""
    height, width = size
    scale_down, scale_across = grid[0] / height, grid[1] / width
    if scale_across < scale_down:
        return min(math.ceil(height * scale_across), grid[0]), grid[1]
    return grid[0], min(math.ceil(width * scale_down), grid[1])


def unpadded(size: Size, patches: Size) -> tuple[slice, slice]:
    """Rows and columns of a grid of patches that an image of `size` covers (LLaVA-NeXT).

    The image stands in the middle; patches of the border are no part of it.
    """
    height, width = size
    rows, columns = patches
    # Rounded before it is cut, or a product that should be whole could lose one.
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(border, rows - border), slice(0, columns)
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(border, columns - border)


def smart_size(size: Size, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Both sides multiples of `factor`, the area within bounds, the shape kept as well as it goes.

    Qwen2-VL's `smart_resize` (arXiv 2409.12191, section 2.1).

    Raises:
        InvalidImageError: one side is more than 200 times the other.
    """
    height, width = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise InvalidImageError(
            f"the image has {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} "
            "times the other: cut it"
        )
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded
