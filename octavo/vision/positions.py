"""Positions of text and images under M-RoPE (arXiv 2409.12191, section 2.1; 2502.13923, 2.1.2).

A token has three positions: in time, down and across. Those of text are equal and count up; an
image's tokens share the time of its place, and what follows goes on after its longer side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.vision.tokens import ImageSpan


@dataclass(frozen=True, slots=True)
class GridSpan:
    """The tokens of one image or video, row by row and frame by frame."""

    span: ImageSpan
    grid: tuple[int, int, int]  # (frames, rows, columns) of tokens, after merging
    frame_step: float = 1.0  # positions in time from one frame of tokens to the next


def mrope_positions(num_tokens: int, images: Sequence[GridSpan]) -> tuple[NDArray[np.int64], int]:
    """The positions of a prompt, and what is added to a later token's place to get its three.

    Args:
        num_tokens: of the prompt, those of images included.
        images: in the order of their places, without overlap.

    Returns:
        (positions [3, num_tokens]: time, down, across; the offset of generated tokens)

    Raises:
        ValueError: a span that does not hold its grid, or overlaps another.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = after = 0  # tokens that have positions, and the position of the next one of text
    for image in images:
        start, end = image.span.start, image.span.end
        deep, rows, columns = image.grid
        if start < done or end > num_tokens or end - start != deep * rows * columns:
            raise ValueError(f"{image} does not fit after token {done} of {num_tokens}")
        positions[:, done:start] = np.arange(after, after + start - done)
        after += start - done
        block = positions[:, start:end].reshape(3, deep, rows, columns)  # a view
        times = (np.arange(deep, dtype=np.float32) * np.float32(image.frame_step)).astype(np.int64)
        block[0] = after + times[:, None, None]
        block[1] = after + np.arange(rows)[:, None]
        block[2] = after + np.arange(columns)
        done, after = end, after + max(rows, columns)
    positions[:, done:] = np.arange(after, after + num_tokens - done)
    longest = int(positions.max()) + 1 if num_tokens else 0
    return positions, longest - num_tokens
