"""Rows that an encoder made of images: kept by content, and laid among the tokens of a step.

The scheduler says what is made and what is dropped. Knows no files and no prompts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.config import ModelConfig, ResolvedConfig
from octavo.core import Picture, StepPlan
from octavo.errors import IntegrityError
from octavo.layers import StepImages
from octavo.models import Model
from octavo.runner.layout import StepLayout
from octavo.runner.rows import Row
from octavo.vision import ImageSpan, num_image_tokens
from octavo.vision.encoders import VisionEncoder
from octavo.vision.positions import GridSpan, mrope_positions
from octavo.vision.tokens import largest_size


class ImageStore:
    """The rows of images on the device. Sole writer: the model runner."""

    def __init__(self, encoder: VisionEncoder, config: ModelConfig, device: str):
        self._encoder = encoder
        self._config = config
        self._device = device
        self._turns = any(rope.sections for rope in config.ropes)  # by positions in images
        self._rows: dict[str, Tensor] = {}  # by content: [num_tokens, hidden_size]

    def update(self, plan: StepPlan) -> None:
        """Drop what the plan drops, then encode its pictures, all of them together."""
        for key in plan.forgotten_images:
            self._rows.pop(key, None)
        if plan.pictures:
            keys = [picture.key for picture in plan.pictures]
            # A copy of each: as views they would all stay for as long as one of them does.
            encoded = [rows.clone() for rows in self._encode(plan.pictures)]
            self._rows |= zip(keys, encoded, strict=True)

    def among(self, step: StepLayout, rows: Sequence[Row]) -> StepImages | None:
        """What of images stands among the step's tokens; None where nothing does.

        Args:
            step: the layout of the step.
            rows: its sequences, in their order.
        """
        if not any(row.images for row in rows):
            return None
        index: list[int] = []
        parts: list[Tensor] = []
        for row, (start, stop, first) in zip(rows, _spans(step), strict=True):
            for image in row.images:
                begin, past = max(start, image.start), min(stop, image.end)
                if begin >= past:
                    continue
                if image.key not in self._rows:
                    raise IntegrityError(f"nobody encoded the image at token {image.start}")
                index += range(first + begin - start, first + past - start)
                parts.append(self._rows[image.key][begin - image.start : past - image.start])
        positions = self._positions(step, rows) if self._turns else None
        if not parts:
            return None if positions is None else StepImages(None, None, positions)
        of_images = torch.cat(parts)
        return StepImages(torch.tensor(index).to(of_images.device), of_images, positions)

    def _positions(self, step: StepLayout, rows: Sequence[Row]) -> Tensor:
        """[3, T]: time, down, across."""
        pieces = [
            _grid_positions(row, start, stop)
            for row, (start, stop, _) in zip(rows, _spans(step), strict=True)
        ]
        return torch.from_numpy(np.concatenate(pieces, axis=1)).to(self._device)

    def _encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        # Pillow is an extra, and engines without images do without it.
        from octavo.vision.processing import picture_from, prepare

        vision, pixels = self._config.vision, self._config.pixels
        if vision is None or pixels is None:
            raise IntegrityError("pictures came to a model that sees none")
        inputs = [prepare(vision, pixels, [picture_from(picture)]) for picture in pictures]
        encoded: list[Tensor] = self._encoder(inputs)
        return encoded


def create_image_store(model: Model, config: ModelConfig, device: str) -> ImageStore | None:
    """The store of a model that sees images."""
    encoder = model.image_encoder
    return None if encoder is None else ImageStore(encoder, config, device)


def largest_pictures(config: ResolvedConfig) -> tuple[Picture, ...]:
    """Black ones, as many and as large as one step may encode; none where the model sees none."""
    vision, pixels = config.model.vision, config.model.pixels
    if vision is None or pixels is None:
        return ()
    height, width = largest_size(pixels)
    num_tokens = num_image_tokens(vision, pixels, (height, width))
    most = min(config.max_num_encoder_tokens, config.num_cached_image_tokens)
    black = bytes(3 * width * height)
    names = (f"largest-{i}" for i in range(max(1, most // num_tokens)))
    return tuple(Picture(name, width, height, black) for name in names)


def _spans(step: StepLayout) -> Iterator[tuple[int, int, int]]:
    """Of each sequence: its first token in the step, the one after its last, and the place."""
    for start, first, end in zip(
        step.starts, step.query_starts, step.query_starts[1:], strict=False
    ):
        yield start, start + end - first, first


def _grid_positions(row: Row, start: int, stop: int) -> NDArray[np.int64]:
    """[3, stop - start]: those of a sequence's tokens from `start` on."""
    if not row.images:
        return np.tile(np.arange(start, stop), (3, 1))
    if row.grid_positions is None:
        spans = [
            GridSpan(ImageSpan(image.start, image.num_tokens), image.grid)
            for image in row.images
            if image.grid is not None
        ]
        row.grid_positions = mrope_positions(row.num_prompt_tokens, spans)
    of_prompt, offset = row.grid_positions
    later = np.arange(max(start, row.num_prompt_tokens), stop) + offset
    return np.concatenate((of_prompt[:, start:stop], np.tile(later, (3, 1))), axis=1)
