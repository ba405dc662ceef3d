"""Pixels against transformers' own processors, those that run on Pillow and numpy."""

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.config.families.vision_pixels import CLIP_MEAN, CLIP_STD, read_pixel_settings
from octavo.config.families.vision_shapes import (
    Blip2VisionConfig,
    LlavaVisionConfig,
    PatchPixels,
    PixelScale,
    QFormerConfig,
    Qwen25VisionConfig,
    ViTConfig,
)
from octavo.config.model import MLPConfig
from octavo.errors import InvalidImageError
from octavo.vision.geometry import unpadded
from octavo.vision.processing import prepare
from octavo.vision.tokens import num_image_tokens

MLP = MLPConfig(8, bias=True, activation="gelu", gated=False)
TOWER = ViTConfig(8, 1, 1, MLP, image_size=28, patch_size=7, norm_eps=1e-5)
GRIDS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
LLAVA = LlavaVisionConfig(TOWER, (1,), False, MLP, 8)
LLAVA_NEXT = LlavaVisionConfig(TOWER, (1,), False, MLP, 8, tile_grids=GRIDS)
BLIP2 = Blip2VisionConfig(TOWER, QFormerConfig(8, 1, 1, MLP, 1e-5, 1, 3), 8)
QWEN = Qwen25VisionConfig(
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    mlp=MLP,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    window_size=16,
    full_layers=(),
    rope_theta=1e4,
    tokens_per_second=2,
    out_hidden_size=8,
)
SIZES = [
    (28, 28),
    (2, 2),
    (3, 300),
    (300, 3),
    (50, 97),
    (97, 51),
    (56, 56),
    (57, 28),
    (640, 480),
    (20, 60),
]
OTHER_COLOURS = {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.3, 2.0]}


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(module, name, **config):
    import importlib

    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, name)(**config)


def written(reference):
    """What `save_pretrained` writes of a processor."""
    import json

    return json.loads(reference.to_json_string())


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 41}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 29}, "crop_size": {"height": 28, "width": 28}, "resample": 2},
        {"size": {"height": 28, "width": 28}, "do_center_crop": False, **OTHER_COLOURS},
    ],
)
def test_clip_pixels_are_those_of_transformers(config):
    reference = processor("clip", "CLIPImageProcessorPil", **config)
    settings = read_pixel_settings(written(reference), LLAVA)
    for size in SIZES:
        ours = prepare(LLAVA, settings, [picture(*size)])
        theirs = reference(picture(*size), return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours.values, theirs)
        assert ours.num_tokens == 16


def test_blip_pixels_are_those_of_transformers():
    reference = processor(
        "blip", "BlipImageProcessorPil", size={"height": 28, "width": 28}, **OTHER_COLOURS
    )
    settings = read_pixel_settings(written(reference), BLIP2)
    for size in SIZES:
        ours = prepare(BLIP2, settings, [picture(*size)])
        theirs = reference(picture(*size), return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours.values, theirs)
        assert ours.num_tokens == 3


def test_llava_next_tiles_are_those_of_transformers():
    reference = processor(
        "llava_next",
        "LlavaNextImageProcessorPil",
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
    )
    settings = read_pixel_settings(written(reference), LLAVA_NEXT)
    grids = set()
    for size in SIZES:
        ours = prepare(LLAVA_NEXT, settings, [picture(*size)])
        theirs = reference(picture(*size), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(ours.values, theirs)
        grids.add(ours.grid)
    assert len(grids) >= 4


def test_llava_next_tokens_are_as_many_as_transformers_counts():
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    class Counter:
        patch_size, num_additional_image_tokens = TOWER.patch_size, 1
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

        class image_processor:
            image_grid_pinpoints = [list(grid) for grid in GRIDS]

    settings = read_pixel_settings(
        {
            "size": {"shortest_edge": 28},
            "image_grid_pinpoints": [list(grid) for grid in GRIDS],
        },
        LLAVA_NEXT,
    )
    sizes = np.random.default_rng(0).integers(2, 400, (500, 2)).tolist()
    for height, width in sizes:
        theirs = LlavaNextProcessor._get_number_of_features(Counter(), height, width, 28, 28) - 1
        assert num_image_tokens(LLAVA_NEXT, settings, (height, width)) == theirs, (height, width)


def test_features_are_unpadded_as_transformers_does():
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    places = torch.arange(24 * 36).view(1, 24, 36)
    for height, width in np.random.default_rng(1).integers(2, 400, (500, 2)).tolist():
        rows, columns = unpadded((height, width), (24, 36))
        theirs = unpad_image(places, (height, width))
        assert torch.equal(places[:, rows, columns], theirs), (height, width)


@pytest.mark.parametrize("bounds", [(12 * 24, 40 * 60), (8 * 8, 8 * 16), (100_000, 1_000_000)])
def test_qwen_patches_are_those_of_transformers(bounds):
    reference = processor(
        "qwen2_vl",
        "Qwen2VLImageProcessorPil",
        size={"shortest_edge": bounds[0], "longest_edge": bounds[1]},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
    )
    settings = read_pixel_settings(written(reference), QWEN)
    assert settings == read_pixel_settings({"min_pixels": bounds[0], "max_pixels": bounds[1]}, QWEN)
    for size in SIZES:
        ours = prepare(QWEN, settings, [picture(*size)])
        theirs = reference(picture(*size), return_tensors="np")
        np.testing.assert_array_equal(ours.values, theirs["pixel_values"])
        assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
        assert ours.num_tokens == len(ours.values) // 4


def patch_settings(**changes):
    fields = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "resample": 3}
    bounds = {"min_pixels": 64, "max_pixels": 4096}
    scale = PixelScale(1 / 255, CLIP_MEAN, CLIP_STD)
    return PatchPixels(**fields | bounds | changes, scale=scale)


def test_each_frame_of_a_video_is_a_layer_of_patches_and_the_last_one_fills_up():
    frames = [picture(24, 40, seed) for seed in range(3)]
    settings = patch_settings()
    video = prepare(QWEN, settings, frames)
    assert video.grid == (2, 6, 10) and video.num_tokens == 2 * 3 * 5
    # An image is a video of itself twice, so it tells what each frame's half of a patch is.
    halves = [
        prepare(QWEN, settings, [frame]).values.reshape(-1, 3, 2, 16)[:, :, 0] for frame in frames
    ]
    patches = video.values.reshape(2, 60, 3, 2, 16)
    for layer, pair in enumerate([(0, 1), (2, 2)]):
        for place, frame in enumerate(pair):
            np.testing.assert_array_equal(patches[layer, :, :, place], halves[frame])


def test_what_a_model_cannot_take_is_refused():
    square = read_pixel_settings({"size": {"shortest_edge": 28}}, LLAVA)
    with pytest.raises(InvalidImageError, match="images, not videos"):
        prepare(LLAVA, square, [picture(28, 28)] * 2)
    with pytest.raises(InvalidImageError, match="200 times"):
        prepare(QWEN, patch_settings(), [picture(2, 401)])
    with pytest.raises(InvalidImageError, match="one size"):
        prepare(QWEN, patch_settings(), [picture(24, 40), picture(40, 24)])
