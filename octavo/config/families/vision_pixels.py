"""How a checkpoint wants images and videos prepared: its processors' files, checked, in our words.

What the towers could not run, or what would silently change the numbers, is refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config.checkpoint import Checkpoint
from octavo.config.families.vision_fields import MAX_IMAGE_SIZE, refuse_other_than
from octavo.config.families.vision_llava import tile_grids
from octavo.config.families.vision_shapes import (
    LlavaVisionConfig,
    PatchPixels,
    PixelScale,
    PixelSettings,
    Qwen25VisionConfig,
    SquarePixels,
    TiledPixels,
    VideoSettings,
    VisionConfig,
)
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader, short
from octavo.errors import CheckpointError

BICUBIC = 3  # Pillow's number
# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers, which its processors fall back on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# (fewest, most) pixels: defaults of transformers' Qwen2-VL processors.
IMAGE_PIXELS, VIDEO_PIXELS = (56 * 56, 28 * 28 * 1280), (128 * 28 * 28, 28 * 28 * 768)
MAX_MAX_PIXELS = 2**26
# Of Qwen's own qwen_vl_utils; transformers has the same numbers of frames.
FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
MAX_FPS = 1000.0


def image_processor_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The image processor's part of the files: transformers 5 has it in `processor_config.json`.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    found: Any = checkpoint.json("preprocessor_config.json")
    found = found or checkpoint.json("processor_config.json").get("image_processor")
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(
            f"{checkpoint.path} has neither preprocessor_config.json nor an image_processor in "
            "processor_config.json, so nobody knows how its images are prepared; transformers "
            "writes one: AutoImageProcessor.from_pretrained(...).save_pretrained(...)"
        )
    return found


def with_pixels(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config of a model, and how what it sees is prepared, if it sees. Raises as below."""
    if config.vision is None:
        return config
    pixels = read_pixel_settings(image_processor_config(checkpoint), config.vision)
    if config.video_token_id is None or not isinstance(config.vision, Qwen25VisionConfig):
        return replace(config, pixels=pixels)
    videos = read_video_settings(video_processor_config(checkpoint), config.vision)
    return replace(config, pixels=pixels, videos=videos)


def video_processor_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The video processor's part of the files; older checkpoints have one for images and videos.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    found: Any = checkpoint.json("video_preprocessor_config.json")
    found = found or checkpoint.json("processor_config.json").get("video_processor")
    if isinstance(found, Mapping) and found:
        return found
    return image_processor_config(checkpoint)


def read_video_settings(config: Mapping[str, Any], vision: Qwen25VisionConfig) -> VideoSettings:
    """What the video processor of this tower does. Raises as `read_pixel_settings` does.

    Args:
        config: of the video processor, as `video_processor_config` finds it.
        vision: of the same checkpoint.
    """
    read, resample, scale = _every_processor(config)
    # A share of all pixels for each frame, and a number of frames whatever the length: not ours.
    refuse_other_than(read, "cap_pixels_per_frame", False)
    if read.has("num_frames"):
        raise read.unsupported("num_frames", read.raw("num_frames"), "only frames by the second")
    settings = VideoSettings(
        pixels=_patches(read, vision, resample, scale, bounds=VIDEO_PIXELS),
        fps=read.number("fps", 1e-3, MAX_FPS, default=FPS),
        min_frames=read.integer("min_frames", 1, MAX_FRAMES, default=MIN_FRAMES),
        max_frames=read.integer("max_frames", 1, 2**16, default=MAX_FRAMES),
    )
    if settings.min_frames > settings.max_frames:
        raise read.wrong("min_frames", settings.min_frames, "no more than max_frames")
    return settings


def read_pixel_settings(config: Mapping[str, Any], vision: VisionConfig) -> PixelSettings:
    """What the image processor of this tower does.

    Args:
        config: of the image processor, as `image_processor_config` finds it.
        vision: of the same checkpoint; what does not fit it is refused.

    Raises:
        UnsupportedModelError: a sound value that is not supported.
        CheckpointError: a value that is damaged, or does not fit the tower.
    """
    read, resample, scale = _every_processor(config)
    if isinstance(vision, Qwen25VisionConfig):
        return _patches(read, vision, resample, scale, bounds=IMAGE_PIXELS)
    tower = vision.tower
    if not isinstance(vision, LlavaVisionConfig):
        return _square(read, tower.image_size, resample, scale, crops=False)
    square = _square(read, tower.image_size, resample, scale, crops=True)
    if not vision.tile_grids:
        return square
    grids = tile_grids(read, tower.image_size)
    if grids != vision.tile_grids:
        raise CheckpointError(
            f"preprocessor_config: image_grid_pinpoints={short(grids)}, but the model's config "
            f"says {short(vision.tile_grids)}"
        )
    if square.shortest_side not in (None, tower.image_size):
        raise read.wrong("size", read.raw("size"), f"the tile's {tower.image_size} pixels")
    return TiledPixels(tower.image_size, grids, resample, scale)


def _every_processor(config: Mapping[str, Any]) -> tuple[Reader, int, PixelScale]:
    """(the checked config, Pillow's number of the filter, what becomes of bytes)"""
    read = Reader(config, where="preprocessor_config")
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        refuse_other_than(read, step, True)
    return read, read.integer("resample", 0, 5, default=BICUBIC), _scale(read)


def _scale(read: Reader) -> PixelScale:
    def channels(name: str, default: tuple[float, ...], low: float) -> tuple[float, ...]:
        return read.numbers(name, 3, low, 1e3) if read.has(name) else default

    return PixelScale(
        rescale=read.number("rescale_factor", 1e-9, 1e3, default=1 / 255),
        mean=channels("image_mean", CLIP_MEAN, -1e3),
        std=channels("image_std", CLIP_STD, 1e-6),
    )


def _square(
    read: Reader, image_size: int, resample: int, scale: PixelScale, *, crops: bool
) -> SquarePixels:
    """Sizes in the three ways in which they are written; the square must be the tower's.

    `crops` is whether this family's processor cuts a square out where the config does not say.
    """
    shortest, square = _sides(read, "size")
    cropped: int | None = None
    if read.boolean("do_center_crop", crops):
        cropped = next((side for side in _sides(read, "crop_size") if side), image_size)
    elif square is None:
        raise read.unsupported(
            "do_center_crop", False, "only beside a size of height and width: towers see squares"
        )
    final = cropped or square
    if final != image_size:
        raise CheckpointError(
            f"preprocessor_config: images of {final} pixels a side, but the tower's image_size is "
            f"{image_size}"
        )
    if square is not None and square != image_size:
        raise read.unsupported("size", read.raw("size"), f"only {image_size} pixels, or none cut")
    if square is None and (shortest := shortest or image_size) < image_size:
        raise read.wrong("size", read.raw("size"), f"no less than the {image_size} that are cut")
    return SquarePixels(image_size, shortest, resample, scale)


def _sides(read: Reader, name: str) -> tuple[int | None, int | None]:
    """(shortest side, side of a square): one of them, or neither where nothing is written."""
    written = read.raw(name)
    if written is None:
        return None, None
    if not isinstance(written, Mapping):
        # transformers 4 wrote a number: CLIP's shortest side.
        return read.integer(name, 1, MAX_IMAGE_SIZE), None
    sizes = Reader(written, where=f"preprocessor_config: {name}")
    if sizes.has("shortest_edge"):
        refuse_other_than(sizes, "longest_edge")
        return sizes.integer("shortest_edge", 1, MAX_IMAGE_SIZE), None
    height, width = (sizes.integer(side, 1, MAX_IMAGE_SIZE) for side in ("height", "width"))
    if height != width:
        raise read.unsupported(name, written, "only squares")
    return None, height


def _patches(
    read: Reader,
    vision: Qwen25VisionConfig,
    resample: int,
    scale: PixelScale,
    *,
    bounds: tuple[int, int],
) -> PatchPixels:
    """`bounds` are the fewest and most pixels where the config does not say."""
    for name, of_tower in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.merge_size),
    ):
        if read.has(name) and read.raw(name) != of_tower:
            raise read.wrong(name, read.raw(name), f"the tower's {of_tower}")
    size = read.raw("size") or {}
    if not isinstance(size, Mapping):
        raise read.wrong("size", size, "an object")
    sizes = Reader(size, where="preprocessor_config: size")
    low, high = (
        read.integer(old, 1, MAX_MAX_PIXELS, default=default)
        if read.has(old)
        else sizes.integer(new, 1, MAX_MAX_PIXELS, default=default)
        for old, new, default in (
            ("min_pixels", "shortest_edge", bounds[0]),
            ("max_pixels", "longest_edge", bounds[1]),
        )
    )
    if low > high:
        raise CheckpointError(f"preprocessor_config: at least {low} and at most {high} pixels")
    return PatchPixels(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        min_pixels=low,
        max_pixels=high,
        resample=resample,
        scale=scale,
    )
