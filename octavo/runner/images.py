"""Rows that an encoder made of images: kept by content, and laid among the tokens of a step.

The scheduler says what is made and what is dropped. Knows no files and no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.config import ModelConfig, ResolvedConfig
from octavo.core import Picture, StepPlan
from octavo.errors import IntegrityError
from octavo.layers import StepImages
from octavo.models import Model
from octavo.runner.layout import StepLayout
from octavo.runner.rows import Row
from octavo.vision import num_image_tokens
from octavo.vision.tokens import largest_size

if TYPE_CHECKING:  # as in octavo.models.base
    from PIL.Image import Image

    from octavo.config.families.vision_shapes import PixelSettings, VisionConfig
    from octavo.vision.encoders import VisionEncoder


class ImageStore:
    """The rows of images on the device. Sole writer: the model runner."""

    def __init__(
        self,
        encoder: VisionEncoder,
        config: ModelConfig,
        device: str,
        *,
        max_num_encoder_tokens: int,
    ):
        self._encoder = encoder
        self._config = config
        self._device = device
        self._max_num_encoder_tokens = max_num_encoder_tokens
        self._rows: dict[str, Tensor] = {}  # by content: [num_tokens, hidden_size]

    def update(self, plan: StepPlan) -> None:
        """Drop what the plan drops, then encode its pictures, all of them together."""
        for key in plan.forgotten_images:
            self._rows.pop(key, None)
        if plan.pictures:
            self._rows |= self._encode(plan.pictures)

    def among(self, step: StepLayout, rows: Sequence[Row]) -> StepImages | None:
        """The rows of images among the step's tokens; None where there are none.

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
        if not parts:
            return None
        of_images = torch.cat(parts)
        return StepImages(torch.tensor(index).to(of_images.device), of_images)

    def _encode(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """All pictures together; a video of more tokens than that piece by piece.

        No frame sees another one in an encoder, so a long video needs no more memory than a step.
        """
        # Pillow is an extra, and engines without images do without it.
        from octavo.vision.processing import prepare

        parts: dict[str, list[Tensor]] = {picture.key: [] for picture in pictures}
        for batch in self._batches(pictures):
            inputs = [prepare(self._vision, piece.pixels, piece.frames) for piece in batch]
            for piece, rows in zip(batch, self._encoder(inputs), strict=True):
                parts[piece.key].append(rows)
        # A copy of each: as views they would all stay for as long as one of them does.
        return {key: torch.cat(rows) for key, rows in parts.items()}

    def _batches(self, pictures: Sequence[Picture]) -> Iterator[list[_Piece]]:
        """Pieces of pictures that go through the encoder together."""
        batch: list[_Piece] = []
        num_tokens = 0
        for piece in chain.from_iterable(map(self._pieces, pictures)):
            if batch and num_tokens + piece.num_tokens > self._max_num_encoder_tokens:
                yield batch
                batch, num_tokens = [], 0
            batch.append(piece)
            num_tokens += piece.num_tokens
        yield batch

    def _pieces(self, picture: Picture) -> Iterator[_Piece]:
        """A picture, or the whole layers of a video of which each is within the budget."""
        from octavo.vision.processing import frames_of

        frames, size = frames_of(picture), (picture.height, picture.width)
        pixels, depth = self._config.pixels, len(frames)
        if picture.num_frames is not None and self._config.videos is not None:
            pixels = self._config.videos.pixels
            layer = num_image_tokens(self._vision, pixels, size)
            depth = pixels.temporal_patch_size * max(1, self._max_num_encoder_tokens // layer)
        if pixels is None:
            raise IntegrityError("pictures came to a model that sees none")
        for start in range(0, len(frames), depth):
            some = frames[start : start + depth]
            count = num_image_tokens(self._vision, pixels, size, num_frames=len(some))
            yield _Piece(picture.key, some, pixels, count)

    @property
    def _vision(self) -> VisionConfig:
        if self._config.vision is None:
            raise IntegrityError("pictures came to a model that sees none")
        return self._config.vision


@dataclass(frozen=True, slots=True)
class _Piece:
    """What of a picture goes through the encoder at once."""

    key: str
    frames: list[Image]
    pixels: PixelSettings
    num_tokens: int


def create_image_store(model: Model, config: ResolvedConfig) -> ImageStore | None:
    """The store of a model that sees images."""
    encoder = model.image_encoder
    if encoder is None:
        return None
    budget = config.max_num_encoder_tokens
    return ImageStore(encoder, config.model, config.device, max_num_encoder_tokens=budget)


def largest_pictures(config: ResolvedConfig) -> tuple[Picture, ...]:
    """Black ones, as many and as large as one step may encode; none where the model sees none."""
    vision, pixels = config.model.vision, config.model.pixels
    if vision is None or pixels is None:
        return ()
    height, width = largest_size(pixels)
    num_tokens = num_image_tokens(vision, pixels, (height, width))
    num_frames = None
    if config.model.videos is not None:
        of_videos = config.model.videos.pixels
        size = largest_size(of_videos)
        if (layer := num_image_tokens(vision, of_videos, size)) > num_tokens:
            (height, width), num_tokens = size, layer
            num_frames = of_videos.temporal_patch_size
    most = min(config.max_num_encoder_tokens, config.num_cached_image_tokens)
    black = bytes(3 * width * height * (num_frames or 1))
    names = (f"largest-{i}" for i in range(max(1, most // num_tokens)))
    return tuple(Picture(name, width, height, black, num_frames) for name in names)


def _spans(step: StepLayout) -> Iterator[tuple[int, int, int]]:
    """Of each sequence: its first token in the step, the one after its last, and the place."""
    for start, first, end in zip(
        step.starts, step.query_starts, step.query_starts[1:], strict=False
    ):
        yield start, start + end - first, first
