"""How many tokens an image becomes, and where they stand in a prompt. Numbers alone.

Counts come from sizes, so a prompt can be laid out before a pixel is touched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.config.families.vision_shapes import (
    Blip2VisionConfig,
    LlavaVisionConfig,
    PatchPixels,
    PixelSettings,
    Qwen25VisionConfig,
    TiledPixels,
    VisionConfig,
)
from octavo.errors import InvalidImageError
from octavo.vision.geometry import Size, best_grid, smart_size, unpadded


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands in a prompt for each image, or for each video, before its tokens do."""

    name: str  # for error messages: of many of them
    token_id: int
    counts: Sequence[int]  # tokens of each, in the order of their places


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The place of one image's tokens in a prompt."""

    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """The first token after it."""
        return self.start + self.num_tokens


def patch_grid(settings: PatchPixels, size: Size, *, num_frames: int = 1) -> tuple[int, int, int]:
    """(frames, rows, columns) of patches of an image or a video. Raises as `smart_size` does."""
    factor = settings.patch_size * settings.merge_size
    height, width = smart_size(
        size, factor=factor, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    deep = -(-num_frames // settings.temporal_patch_size)
    return deep, height // settings.patch_size, width // settings.patch_size


def num_image_tokens(
    vision: VisionConfig, settings: PixelSettings, size: Size, *, num_frames: int = 1
) -> int:
    """Tokens of an image of `size` (height, width), or of a video of such frames.

    Raises:
        InvalidImageError: the model cannot take an image of that shape.
    """
    if isinstance(settings, PatchPixels):
        deep, rows, columns = patch_grid(settings, size, num_frames=num_frames)
        return deep * (rows // settings.merge_size) * (columns // settings.merge_size)
    if num_frames > 1:
        raise InvalidImageError("the model takes images, not videos")
    if isinstance(vision, Blip2VisionConfig):
        return vision.qformer.num_queries
    if isinstance(vision, LlavaVisionConfig):
        return _num_llava_tokens(vision, size)
    raise TypeError(f"{type(settings).__name__} are no pixels for {type(vision).__name__}")


def largest_size(settings: PixelSettings) -> Size:
    """The size of an image that becomes as many tokens as any, or nearly: (height, width)."""
    if isinstance(settings, TiledPixels):
        return max(settings.grids, key=lambda grid: grid[0] * grid[1])
    if isinstance(settings, PatchPixels):
        factor = settings.patch_size * settings.merge_size
        side = max(math.isqrt(settings.max_pixels) // factor, 1) * factor
        return side, side
    return settings.size, settings.size


def token_grid(
    settings: PixelSettings, size: Size, *, num_frames: int = 1
) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of tokens, for models whose positions follow them."""
    if not isinstance(settings, PatchPixels):
        return None
    deep, rows, columns = patch_grid(settings, size, num_frames=num_frames)
    return deep, rows // settings.merge_size, columns // settings.merge_size


def _num_llava_tokens(vision: LlavaVisionConfig, size: Size) -> int:
    tower = vision.tower
    whole = tower.num_patches + vision.keep_class_token
    if not vision.tile_grids:
        return whole
    grid = best_grid(size, vision.tile_grids)
    patches: Size = (
        grid[0] // tower.image_size * tower.patches_per_side,
        grid[1] // tower.image_size * tower.patches_per_side,
    )
    rows, columns = (len(range(part.start, part.stop)) for part in unpadded(size, patches))
    return whole + rows * (columns + 1)  # each row ends with a newline


def frame_step_of(vision: VisionConfig, fps: float) -> float:
    """Positions in time from one layer of patches of a video to the next (arXiv 2502.13923, 2.1.2).

    Args:
        vision: a model's that takes videos.
        fps: frames in a second, `temporal_patch_size` of which are a layer.
    """
    if not isinstance(vision, Qwen25VisionConfig):
        raise TypeError(f"{type(vision).__name__} has no positions in time")
    return vision.tokens_per_second * vision.temporal_patch_size / fps


def expand_placeholders(
    token_ids: Sequence[int], placeholders: Sequence[Placeholder]
) -> tuple[list[int], list[list[ImageSpan]]]:
    """Put each placeholder as often as what it stands for has tokens. O(result).

    Args:
        token_ids: a prompt with one placeholder for each image and each video.
        placeholders: of each kind.

    Returns:
        (the prompt, the places of each kind)

    Raises:
        InvalidImageError: there are not as many placeholders as images, or as videos.
    """
    for one in placeholders:
        if (num_found := sum(token_id == one.token_id for token_id in token_ids)) != len(
            one.counts
        ):
            raise InvalidImageError(
                f"the prompt has {num_found} places for {one.name}, but there are "
                f"{len(one.counts)} {one.name}"
            )
    expanded: list[int] = []
    spans: dict[int, list[ImageSpan]] = {one.token_id: [] for one in placeholders}
    counts = {one.token_id: iter(one.counts) for one in placeholders}
    for token_id in token_ids:
        if token_id in spans:
            span = ImageSpan(len(expanded), next(counts[token_id]))
            spans[token_id].append(span)
            expanded.extend([token_id] * span.num_tokens)
        else:
            expanded.append(token_id)
    return expanded, list(spans.values())
