"""Vision configs: what is read is applied, what is not supported is refused by its name."""

import json

import pytest

from octavo.config import Checkpoint
from octavo.config.families.vision import read_vision_config
from octavo.config.families.vision_pixels import (
    image_processor_config,
    read_pixel_settings,
    read_video_settings,
    video_processor_config,
)
from octavo.errors import CheckpointError, UnsupportedModelError

# The vision parts of published config.json files, as their owners wrote them.
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama", "vocab_size": 32064},  # no hidden_size
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
NEXT = LLAVA | {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
BLIP2 = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "num_query_tokens": 32,
    "qformer_config": {"model_type": "blip_2_qformer"},
    "text_config": {"model_type": "opt", "hidden_size": 2560},
    "vision_config": {"model_type": "blip_2_vision_model"},
}
QWEN = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def with_vision(config, **changes):
    return config | {"vision_config": config["vision_config"] | changes}


def test_published_configs_are_read():
    llava = read_vision_config(LLAVA)
    assert llava.tower.num_patches == 576 and llava.tower.mlp.activation == "quick_gelu"
    assert llava.feature_layers == (23,) and llava.out_hidden_size == 4096
    assert len(read_vision_config(NEXT).tile_grids) == 5
    blip2 = read_vision_config(BLIP2)
    assert (blip2.tower.hidden_size, blip2.tower.num_layers, blip2.tower.norm_eps) == (
        1408,
        39,
        1e-6,
    )
    assert blip2.qformer.cross_attention_every == 2 and blip2.out_hidden_size == 2560
    qwen = read_vision_config(QWEN)
    assert qwen.head_dim == 80 and qwen.window_units == 4 and qwen.patch_values == 1176


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAVA | {"architectures": ["MllamaForConditionalGeneration"]}, "Mllama"),
        (LLAVA | {"architectures": []}, "architecture None"),
        (with_vision(LLAVA, model_type="siglip_vision_model"), "siglip_vision_model"),
        (with_vision(LLAVA, hidden_act="tanh"), "hidden_act='tanh'"),
        (with_vision(LLAVA, num_channels=1), "num_channels=1"),
        (LLAVA | {"vision_feature_select_strategy": "cls"}, "select_strategy='cls'"),
        (NEXT | {"vision_feature_select_strategy": "full"}, "select_strategy='full'"),
        (NEXT | {"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        (NEXT | {"image_grid_pinpoints": [[3360, 3360]]}, "at most 64 tiles"),
        (LLAVA | {"projector_hidden_act": "mish"}, "projector_hidden_act='mish'"),
        (BLIP2 | {"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input"),
        (BLIP2 | {"qformer_config": {"model_type": "instructblip_qformer"}}, "instructblip"),
        (with_vision(QWEN, hidden_act="gelu"), "hidden_act='gelu'"),
        (with_vision(QWEN, in_chans=1), "in_chans=1"),
        (with_vision(QWEN, rope_parameters={"rope_type": "linear"}), "rope_type='linear'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, name):
    with pytest.raises(UnsupportedModelError, match=name):
        read_vision_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({key: LLAVA[key] for key in LLAVA if key != "vision_config"}, "vision_config=None"),
        (LLAVA | {"text_config": {"model_type": "gpt2"}}, "'hidden_size' is missing"),
        (LLAVA | {"vision_feature_layer": -26}, "vision_feature_layer=-26"),
        (LLAVA | {"vision_feature_layer": []}, "at least one layer"),
        (with_vision(LLAVA, hidden_size=1000), "multiple of the 16 heads"),
        (with_vision(LLAVA, patch_size=400), "patch_size"),
        (with_vision(LLAVA, num_hidden_layers="24"), "num_hidden_layers='24'"),
        (BLIP2 | {"qformer_config": {"encoder_hidden_size": 7}}, "encoder_hidden_size=7"),
        (with_vision(QWEN, out_hidden_size=100), "out_hidden_size=100"),
        (with_vision(QWEN, window_size=20), "at least 28 pixels"),
        (with_vision(QWEN, hidden_size=96), "heads of a multiple of 4"),
        (with_vision(QWEN, fullatt_block_indexes=7), "fullatt_block_indexes=7"),
    ],
)
def test_what_is_damaged_is_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        read_vision_config(config)


CLIP_PIXELS = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "size": {"shortest_edge": 336},
    "resample": 3,
}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (LLAVA, CLIP_PIXELS | {"do_resize": False}, "do_resize=False"),
        (LLAVA, CLIP_PIXELS | {"do_normalize": False}, "do_normalize=False"),
        (LLAVA, CLIP_PIXELS | {"do_center_crop": False}, "do_center_crop=False"),
        (LLAVA, CLIP_PIXELS | {"crop_size": 224}, "224 pixels a side, .*image_size is 336"),
        (LLAVA, CLIP_PIXELS | {"size": {"shortest_edge": 224}}, "no less than the 336"),
        (LLAVA, CLIP_PIXELS | {"size": {"height": 336, "width": 100}}, "only squares"),
        (LLAVA, CLIP_PIXELS | {"image_std": [1, 1, 0]}, "image_std"),
        (LLAVA, CLIP_PIXELS | {"image_mean": [1, 1]}, "image_mean"),
        (LLAVA, CLIP_PIXELS | {"resample": 9}, "resample=9"),
        (NEXT, CLIP_PIXELS | {"image_grid_pinpoints": [[672, 672]]}, "the model's config says"),
        (NEXT, CLIP_PIXELS | {"size": {"shortest_edge": 400}}, "the tile's 336"),
        (BLIP2, {"size": {"height": 384, "width": 384}}, "384 pixels a side"),
        (QWEN, {"patch_size": 16}, "the tower's 14"),
        (QWEN, {"merge_size": 1}, "the tower's 2"),
        (QWEN, {"min_pixels": 100, "max_pixels": 50}, "at least 100 and at most 50"),
    ],
)
def test_pixels_that_do_not_fit_are_refused_by_name(model, config, message):
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        read_pixel_settings(config, read_vision_config(model))


def test_the_ways_to_write_a_size_are_one():
    vision = read_vision_config(LLAVA)
    expected = read_pixel_settings(CLIP_PIXELS, vision)
    assert expected == read_pixel_settings({"size": 336, "crop_size": 336}, vision)
    assert expected == read_pixel_settings({}, vision)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_image_processor_is_found_in_either_file(tmp_path, file):
    checkpoint = Checkpoint("tiny", tmp_path, "directory")
    with pytest.raises(CheckpointError, match="neither preprocessor_config.json nor"):
        image_processor_config(checkpoint)
    nested = file.startswith("processor")
    written = {"image_processor": CLIP_PIXELS} if nested else CLIP_PIXELS
    (tmp_path / file).write_text(json.dumps(written))
    assert image_processor_config(checkpoint) == CLIP_PIXELS


def test_videos_have_a_processor_of_their_own_or_that_of_images(tmp_path):
    checkpoint, vision = Checkpoint("tiny", tmp_path, "directory"), read_vision_config(QWEN)
    images = {"min_pixels": 3136, "max_pixels": 12845056}  # as published
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    settings = read_video_settings(video_processor_config(checkpoint), vision)
    assert (settings.pixels.min_pixels, settings.pixels.max_pixels) == (3136, 12845056)
    assert (settings.fps, settings.min_frames, settings.max_frames) == (2.0, 4, 768)
    nested = {"video_processor": {"fps": 1.0, "max_frames": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    settings = read_video_settings(video_processor_config(checkpoint), vision)
    assert (settings.fps, settings.max_frames) == (1.0, 32)
    assert (settings.pixels.min_pixels, settings.pixels.max_pixels) == (100352, 602112)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"fps": 4}))
    assert read_video_settings(video_processor_config(checkpoint), vision).fps == 4.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_frames": 8}, "num_frames=8"),
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame=True"),
        ({"do_resize": False}, "do_resize=False"),
        ({"fps": 0}, "fps=0"),
        ({"min_frames": 9, "max_frames": 8}, "no more than max_frames"),
        ({"patch_size": 16}, "the tower's 14"),
    ],
)
def test_video_processors_that_do_not_fit_are_refused_by_name(config, message):
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        read_video_settings(config, read_vision_config(QWEN))
