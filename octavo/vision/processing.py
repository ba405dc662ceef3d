"""From RGB pictures to the numbers that a tower reads, as transformers' processors make them.

Knows sizes, filters and channels; no files, no models. Needs Pillow and numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from octavo.config.families.vision_shapes import (
    PatchPixels,
    PixelScale,
    PixelSettings,
    SquarePixels,
    TiledPixels,
    VisionConfig,
)
from octavo.core import Picture
from octavo.errors import InvalidImageError
from octavo.vision.geometry import Size, best_grid, shortest_side_size, size_within
from octavo.vision.tokens import num_image_tokens, patch_grid

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One image or video, ready for the encoder of its model."""

    # [images, 3, side, side], the small copy before its tiles, for `SquarePixels` and
    # `TiledPixels`; for `PatchPixels` [patches, numbers of a patch], merged neighbours together.
    values: Values
    grid: tuple[int, int, int]  # (1, rows, columns) of tiles, or (frames, rows, columns) of patches
    size: Size  # of the picture as it came
    num_tokens: int  # rows of the encoder's answer


def frames_of(picture: Picture) -> list[Image.Image]:
    """Pillow's pictures of pixels that came without it: one, or those of a video."""
    size = picture.width, picture.height
    num_bytes = 3 * picture.width * picture.height
    starts = range(0, num_bytes * (picture.num_frames or 1), num_bytes)
    return [
        Image.frombytes("RGB", size, picture.rgb[start : start + num_bytes]) for start in starts
    ]


def prepare(
    vision: VisionConfig, settings: PixelSettings, frames: Sequence[Image.Image]
) -> EncoderInput:
    """What the encoder of `vision` reads of a picture, or of the frames of a video.

    Args:
        vision: the model's.
        settings: the checkpoint's, as `read_pixel_settings` made them.
        frames: one RGB picture, or several of one size.

    Raises:
        InvalidImageError: the model takes no videos, or no image of that shape.
    """
    width, height = frames[0].size
    size = height, width
    num_tokens = num_image_tokens(vision, settings, size, num_frames=len(frames))
    if len({frame.size for frame in frames}) > 1:
        raise InvalidImageError("the frames of a video must have one size")
    grid = 1, 1, 1
    if isinstance(settings, PatchPixels):
        grid = patch_grid(settings, size, num_frames=len(frames))
        values = _patches(frames, grid, settings)
    elif isinstance(settings, TiledPixels):
        best = best_grid(size, settings.grids)
        grid = 1, best[0] // settings.tile_size, best[1] // settings.tile_size
        values = _tiles(frames[0], best, settings)
    else:
        values = _square(frames[0], settings)[None]
    return EncoderInput(values, grid, size, num_tokens)


def _square(image: Image.Image, settings: SquarePixels) -> Values:
    """[3, size, size]"""
    side = settings.size
    if settings.shortest_side is None:
        return _numbers(_resized(image, (side, side), settings.resample), settings.scale)
    height, width = shortest_side_size((image.height, image.width), settings.shortest_side)
    image = _resized(image, (height, width), settings.resample)
    top, left = (height - side) // 2, (width - side) // 2
    return _numbers(image.crop((left, top, left + side, top + side)), settings.scale)


def _tiles(image: Image.Image, grid: Size, settings: TiledPixels) -> Values:
    """[1 + tiles, 3, tile_size, tile_size]: the small copy, then the tiles row by row."""
    side = settings.tile_size
    height, width = size_within((image.height, image.width), grid)
    padded = Image.new("RGB", (grid[1], grid[0]))
    middle = (grid[1] - width) // 2, (grid[0] - height) // 2
    padded.paste(_resized(image, (height, width), settings.resample), middle)
    pictures = [_resized(image, (side, side), settings.resample)]
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            pictures.append(padded.crop((left, top, left + side, top + side)))
    return np.stack([_numbers(picture, settings.scale) for picture in pictures])


def _patches(
    frames: Sequence[Image.Image], grid: tuple[int, int, int], settings: PatchPixels
) -> Values:
    """[patches, 3 * frames of a patch * its rows * its columns] (arXiv 2409.12191, section 2.1)."""
    deep, rows, columns = grid
    side, merge, depth = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    size = rows * side, columns * side
    numbers = [_numbers(_resized(f, size, settings.resample), settings.scale) for f in frames]
    numbers += [numbers[-1]] * (deep * depth - len(numbers))  # the last frame fills up
    blocks = np.stack(numbers).reshape(
        *(deep, depth, 3, rows // merge, merge, side, columns // merge, merge, side)
    )
    # Merged neighbours come together; within a patch channel, frame, row, column.
    blocks = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(deep * rows * columns, 3 * depth * side * side)


def _resized(image: Image.Image, size: Size, resample: int) -> Image.Image:
    return image.resize((size[1], size[0]), resample=Image.Resampling(resample))


def _numbers(image: Image.Image, scale: PixelScale) -> Values:
    """[3, height, width]"""
    pixels = np.asarray(image)  # [height, width, 3]
    return np.stack([table[pixels[..., c]] for c, table in enumerate(_tables(scale))])


@cache
def _tables(scale: PixelScale) -> tuple[Any, ...]:
    """What each of the 256 bytes becomes in each channel, rounded as transformers rounds it."""
    rescaled = (np.arange(256, dtype=np.float64) * scale.rescale).astype(np.float32)
    return tuple(
        (rescaled - np.float32(mean)) / np.float32(std)
        for mean, std in zip(scale.mean, scale.std, strict=True)
    )
