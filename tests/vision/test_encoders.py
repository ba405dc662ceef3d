"""Encoders against transformers' modules: tiny random ones, several images, odd sizes."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from octavo.config import Checkpoint
from octavo.config.families.vision import read_vision_config
from octavo.config.families.vision_pixels import read_pixel_settings
from octavo.layers import Build, finish_layers
from octavo.parallel import ParallelGroup
from octavo.vision.encoders import create_encoder, current_name
from octavo.vision.processing import prepare
from octavo.weights import load_weights
from octavo.weights.safetensors_files import open_safetensors

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 7,  # 2 pixels on each side are nobody's
}
EVA = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
QWEN = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 44,
    "out_hidden_size": 40,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN_TEXT = {key: value for key, value in TEXT.items() if key != "model_type"} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]},
}
GRIDS = [[30, 60], [60, 30], [60, 60], [90, 30]]
SIZES = [(30, 30), (45, 90), (200, 31), (33, 34), (17, 61)]


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(kind, folder, **config):
    """A random checkpoint of transformers, its weights large enough that layers count."""
    import transformers

    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**config)
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.1)
        else:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model


def load(folder, build=None, **preprocessor):
    """(the vision part of a checkpoint, its encoder, how its pixels are prepared)"""
    build = build or Build("cpu", torch.float32)
    checkpoint = Checkpoint("tiny", folder, "directory")
    vision = read_vision_config(checkpoint.config())
    encoder = create_encoder(vision, build)
    others = ("language_model.", "lm_head.", "model.")
    tensors = open_safetensors(checkpoint, build.dtype)
    load_weights(
        encoder.slots(), [(current_name(n), t) for n, t in tensors if not n.startswith(others)]
    )
    finish_layers(encoder)
    return vision, encoder, read_pixel_settings(preprocessor, vision)


def check(ours, theirs, inputs):
    assert [len(rows) for rows in ours] == [one.num_tokens for one in inputs]
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)
        assert mine.std() > 0.05  # features of nothing would prove nothing


VARIANTS = {
    "as published": {},
    "another layer": {"vision_feature_layer": -1},
    "the first layers": {"vision_feature_layer": [0, 1]},
    "several layers": {"vision_feature_layer": [-4, -2, 3]},
    "the class token kept": {"vision_feature_select_strategy": "full"},
    "no bias": {"multimodal_projector_bias": False},
    "another activation": {"projector_hidden_act": "gelu_pytorch_tanh"},
    "another tower": {
        "vision_config": CLIP | {"hidden_act": "gelu", "layer_norm_eps": 0.3, "image_size": 28}
    },
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_llava_sees_what_transformers_sees(tmp_path, variant):
    model = save("Llava", tmp_path, **({"vision_config": CLIP, "text_config": TEXT} | variant))
    side = variant.get("vision_config", CLIP)["image_size"]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    vision, encoder, settings = load(tmp_path, **size)
    inputs = [prepare(vision, settings, [picture(*size)]) for size in SIZES]
    pixels = torch.from_numpy(np.concatenate([one.values for one in inputs]))
    theirs = model.get_image_features(pixels).pooler_output
    check(encoder(inputs), theirs, inputs)
    alone = encoder(inputs[2:3])  # and no image sees another
    torch.testing.assert_close(alone[0], theirs[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [-2, [-3, -1]])
@torch.inference_mode()
def test_llava_next_joins_tiles_as_transformers_does(tmp_path, layers):
    model = save(
        "LlavaNext",
        tmp_path,
        vision_config=CLIP,
        text_config=TEXT,
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=layers,
    )
    crop = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    vision, encoder, settings = load(tmp_path, image_grid_pinpoints=GRIDS, **crop)
    inputs = [prepare(vision, settings, [picture(*size)]) for size in SIZES]
    sizes = torch.tensor([one.size for one in inputs])
    pixels = torch.from_numpy(np.concatenate([one.values for one in inputs]))
    theirs = model.model.get_image_features(pixels, sizes).pooler_output
    assert len({len(rows) for rows in theirs}) > 3  # shapes that unpad differently
    check(encoder(inputs), theirs, inputs)


@pytest.mark.parametrize("variant", [{}, {"qkv_bias": False, "hidden_act": "quick_gelu"}])
@pytest.mark.parametrize("frequency", [1, 2])
@torch.inference_mode()
def test_blip2_queries_what_transformers_queries(tmp_path, variant, frequency):
    model = save(
        "Blip2",
        tmp_path,
        vision_config=EVA | variant,
        qformer_config=QFORMER | {"cross_attention_frequency": frequency},
        text_config=TEXT,
        num_query_tokens=5,
    )
    vision, encoder, settings = load(tmp_path, size={"height": 28, "width": 28})
    inputs = [prepare(vision, settings, [picture(*size)]) for size in SIZES]
    pixels = torch.from_numpy(np.concatenate([one.values for one in inputs]))
    check(encoder(inputs), model.get_image_features(pixels).pooler_output, inputs)


QWEN_VARIANTS = {
    "as published": {},
    "all windows": {"fullatt_block_indexes": []},
    "windows of one token": {"window_size": 8},
    "another angle": {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
    "deeper patches": {"temporal_patch_size": 3, "spatial_merge_size": 3, "window_size": 24},
}


@pytest.mark.parametrize("variant", QWEN_VARIANTS.values(), ids=QWEN_VARIANTS)
@torch.inference_mode()
def test_qwen2_5_vl_sees_what_transformers_sees(tmp_path, variant):
    model = save("Qwen2_5_VL", tmp_path, vision_config=QWEN | variant, text_config=QWEN_TEXT)
    vision, encoder, settings = load(
        tmp_path, size={"shortest_edge": 12 * 24, "longest_edge": 40 * 60}
    )
    pictures = [[picture(*size)] for size in SIZES]
    pictures += [[picture(30, 50, seed) for seed in range(3)]]  # a video
    inputs = [prepare(vision, settings, frames) for frames in pictures]
    assert len({one.grid for one in inputs}) > 3
    grids = torch.tensor([one.grid for one in inputs])
    pixels = torch.from_numpy(np.concatenate([one.values for one in inputs]))
    theirs = model.get_image_features(pixels, grids).pooler_output
    check(encoder(inputs), theirs, inputs)
    alone = encoder(inputs[3:4])
    torch.testing.assert_close(alone[0], theirs[3], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_layers_behind_the_wanted_one_are_checked_but_hold_no_memory(tmp_path):
    save("Llava", tmp_path, vision_config=CLIP, text_config=TEXT)
    vision, encoder, _ = load(tmp_path)
    whole = create_encoder(
        dataclasses.replace(vision, feature_layers=(4,)), Build("cpu", torch.float32)
    )
    assert encoder.slots().keys() == whole.slots().keys()
    assert len(encoder.tower.blocks) == 3
    slot = encoder.slots()["vision_tower.encoder.layers.3.mlp.fc1.weight"]
    assert slot.shape == (44, 24)


def test_encoders_run_in_bf16(tmp_path):
    save("Llava", tmp_path, vision_config=CLIP, text_config=TEXT)
    vision, exact, settings = load(tmp_path)
    _, encoder, _ = load(tmp_path, Build("cpu", torch.bfloat16))
    inputs = [prepare(vision, settings, [picture(40, 50)])]
    with torch.inference_mode():
        (rows,), (reference,) = encoder(inputs), exact(inputs)
    assert rows.dtype is torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rows.float(), reference).min() > 0.99


def test_names_of_published_checkpoints_are_read(tmp_path):
    save("Llava", tmp_path, vision_config=CLIP, text_config=TEXT)
    vision, encoder, settings = load(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(old, file)
    inputs = [prepare(vision, settings, [picture(40, 50)])]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path)[1](inputs)[0], encoder(inputs)[0])


class Sums:
    """What two ranks in two threads put together, in the order of their calls."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=30)
        self.parts = {}

    def of(self, rank, partial):
        self.parts[rank] = partial
        self.barrier.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("kind", ["Llava", "Blip2", "Qwen2_5_VL"])
def test_two_ranks_make_together_what_one_makes(tmp_path, kind):
    parts = {
        "Llava": {"vision_config": CLIP | {"num_attention_heads": 4}, "text_config": TEXT},
        "Blip2": {
            "vision_config": EVA | {"num_attention_heads": 4},
            "qformer_config": QFORMER,
            "text_config": TEXT,
            "num_query_tokens": 5,
        },
        "Qwen2_5_VL": {"vision_config": QWEN, "text_config": QWEN_TEXT},
    }
    preprocessor = {"size": {"height": 28, "width": 28}} if kind == "Blip2" else {}
    if kind == "Qwen2_5_VL":
        preprocessor = {"min_pixels": 64, "max_pixels": 40 * 40}
    save(kind, tmp_path, **parts[kind])
    vision, whole, settings = load(tmp_path, **preprocessor)
    inputs = [prepare(vision, settings, [picture(*size)]) for size in SIZES[:2]]
    sums = Sums()

    class Rank(ParallelGroup):
        def all_reduce(self, partial):
            return sums.of(self.rank, partial)

    def run(rank):
        build = Build("cpu", torch.float32, group=Rank(rank, 2))
        with torch.inference_mode():
            return load(tmp_path, build, **preprocessor)[1](inputs)

    with torch.inference_mode(), ThreadPoolExecutor(2) as pool:
        expected, both = whole(inputs), list(pool.map(run, range(2)))
    for image, ranks in zip(expected, zip(*both, strict=True), strict=True):
        for rows in ranks:
            torch.testing.assert_close(rows, image, atol=1e-5, rtol=1e-4)
