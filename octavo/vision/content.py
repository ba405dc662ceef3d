"""The name of an image's content: equal only where an encoder would answer the same.

It is what caches of features and of KV blocks go by, so two images of equal bytes must not share a
name where their shapes, their modes or what is done to their pixels differ.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from octavo.config.families.vision_shapes import PixelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

# Modes whose pixels are all of them: no palette beside the bytes.
PLAIN_MODES = ("RGB", "L")


def content_key(
    frames: "Sequence[Image]", settings: PixelSettings, *, frame_step: float | None = None
) -> str:
    """SHA-256 over pixels, sizes, modes and settings, in hexadecimal.

    Args:
        frames: one picture, or the frames of a video.
        settings: how they will be prepared.
        frame_step: of a video, positions in time between its frames: the KV blocks of another pace
            are others, too. None: an image.

    Raises:
        ValueError: a mode with a palette, or no frames; `decode_image` makes RGB of all.
    """
    if not frames or any(frame.mode not in PLAIN_MODES for frame in frames):
        modes = [frame.mode for frame in frames]
        raise ValueError(f"content of modes {modes} has no name: convert to RGB first")
    name = type(settings).__name__
    shapes = [(frame.mode, *frame.size) for frame in frames]
    # All lengths are in the head, so no two contents can run into each other.
    head = json.dumps([name, asdict(settings), shapes, frame_step], sort_keys=True).encode()
    digest = hashlib.sha256(len(head).to_bytes(8, "little") + head)
    for frame in frames:
        digest.update(frame.tobytes())
    return digest.hexdigest()
