"""The vision part of LLaVA 1.5 and LLaVA-NeXT (1.6)."""

from collections.abc import Mapping
from typing import Any

from octavo.config.families.vision_fields import (
    MAX_IMAGE_SIZE,
    activation,
    refuse_other_than,
    section,
    text_hidden_size,
    vit,
)
from octavo.config.families.vision_shapes import LlavaVisionConfig, ViTConfig
from octavo.config.model import MLPConfig
from octavo.config.reading import Reader

MAX_TILES = 64
# Those of transformers' CLIPVisionConfig.
CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# That of transformers' LlavaNextConfig.
TILE_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def read_llava_vision(config: Mapping[str, Any]) -> LlavaVisionConfig:
    """`LlavaForConditionalGeneration`."""
    return _read(config, tiled=False)


def read_llava_next_vision(config: Mapping[str, Any]) -> LlavaVisionConfig:
    """`LlavaNextForConditionalGeneration`."""
    return _read(config, tiled=True)


def _read(config: Mapping[str, Any], *, tiled: bool) -> LlavaVisionConfig:
    read, read_tower = Reader(config), section(config, "vision_config")
    refuse_other_than(read_tower, "model_type", "clip_vision_model")
    refuse_other_than(read_tower, "num_channels", 3)
    tower = vit(read_tower, CLIP_DEFAULTS)
    width = text_hidden_size(config)
    strategies = ("default",) if tiled else ("default", "full")
    refuse_other_than(read, "vision_feature_select_strategy", *strategies)
    return LlavaVisionConfig(
        tower=tower,
        feature_layers=_feature_layers(read, tower),
        keep_class_token=read.raw("vision_feature_select_strategy") == "full",
        projector=MLPConfig(
            width,
            bias=read.boolean("multimodal_projector_bias", True),
            activation=activation(read, "projector_hidden_act", "gelu"),
            gated=False,
        ),
        out_hidden_size=width,
        tile_grids=tile_grids(read, tower.image_size) if tiled else (),
    )


def _feature_layers(read: Reader, tower: ViTConfig) -> tuple[int, ...]:
    """`vision_feature_layer`, counted from the front; transformers counts from either end."""
    written = read.raw("vision_feature_layer")
    written = -2 if written is None else written
    layers = written if isinstance(written, list) else [written]
    num_states = tower.num_layers + 1
    for layer in layers:
        if type(layer) is not int or not -num_states <= layer < num_states:
            raise read.wrong(
                "vision_feature_layer", written, f"of the tower's {num_states} hidden states"
            )
    if not layers:
        raise read.wrong("vision_feature_layer", written, "at least one layer")
    return tuple(layer % num_states for layer in layers)


def tile_grids(read: Reader, tile_size: int) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`: sizes in pixels that an image may be cut to tiles at."""
    name = "image_grid_pinpoints"
    written = read.raw(name) or TILE_GRIDS
    if not isinstance(written, list):
        raise read.wrong(name, written, "a list of [height, width]")
    for grid in written:
        if not isinstance(grid, list) or len(grid) != 2:
            raise read.wrong(name, written, "a list of [height, width]")
        if not all(type(side) is int and 0 < side <= MAX_IMAGE_SIZE for side in grid):
            raise read.wrong(name, grid, f"two sides of 1..{MAX_IMAGE_SIZE} pixels")
        if any(side % tile_size for side in grid):
            raise read.unsupported(name, grid, f"only multiples of the tile's {tile_size} pixels")
        if grid[0] * grid[1] > MAX_TILES * tile_size**2:
            raise read.unsupported(name, grid, f"at most {MAX_TILES} tiles")
    return tuple((height, width) for height, width in written)
