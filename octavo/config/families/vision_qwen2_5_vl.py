"""The vision tower of Qwen2.5-VL (arXiv 2502.13923)."""

from collections.abc import Mapping
from typing import Any

from octavo.config.families.vision_fields import (
    MAX_PATCH_SIZE,
    check_heads,
    refuse_other_than,
    section,
)
from octavo.config.families.vision_shapes import Qwen25VisionConfig
from octavo.config.model import MLPConfig
from octavo.config.reading import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_LAYERS, Reader
from octavo.errors import CheckpointError

MAX_MERGE_SIZE = 16
MAX_WINDOW_SIZE = 2**14
FULL_LAYERS = [7, 15, 23, 31]  # here and below the defaults of transformers' config class


def read_qwen2_5_vl_vision(config: Mapping[str, Any]) -> Qwen25VisionConfig:
    """`Qwen2_5_VLForConditionalGeneration`."""
    read = section(config, "vision_config")
    refuse_other_than(read, "model_type", "qwen2_5_vl_vision", "qwen2_5_vl")
    refuse_other_than(read, "hidden_act", "silu")
    refuse_other_than(read, "in_channels", 3)
    refuse_other_than(read, "in_chans", 3)
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE, default=3584)
    num_heads = read.integer("num_heads", 1, MAX_HEADS, default=16)
    check_heads(read, hidden_size, num_heads)
    if hidden_size // num_heads % 4:
        raise read.wrong("hidden_size", hidden_size, "heads of a multiple of 4 numbers")
    num_layers = read.integer("depth", 1, MAX_LAYERS, default=32)
    patch_size = read.integer("patch_size", 1, MAX_PATCH_SIZE, default=14)
    merge_size = read.integer("spatial_merge_size", 1, MAX_MERGE_SIZE, default=2)
    window_size = read.integer("window_size", 1, MAX_WINDOW_SIZE, default=112)
    if window_size < patch_size * merge_size:
        raise read.wrong("window_size", window_size, f"at least {patch_size * merge_size} pixels")
    inner = read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE, default=3420)
    return Qwen25VisionConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp=MLPConfig(inner, bias=True),
        patch_size=patch_size,
        temporal_patch_size=read.integer("temporal_patch_size", 1, MAX_MERGE_SIZE, default=2),
        merge_size=merge_size,
        window_size=window_size,
        full_layers=_full_layers(read, num_layers),
        rope_theta=_rope_theta(read),
        tokens_per_second=read.integer("tokens_per_second", 1, 1000, default=4),
        out_hidden_size=_out_hidden_size(config, read),
    )


def _full_layers(read: Reader, num_layers: int) -> tuple[int, ...]:
    name = "fullatt_block_indexes"
    written = read.raw(name) if read.has(name) else FULL_LAYERS
    if not isinstance(written, list) or not all(type(layer) is int for layer in written):
        raise read.wrong(name, written, "a list of layers")
    return tuple(layer for layer in written if 0 <= layer < num_layers)


def _rope_theta(read: Reader) -> float:
    """The axial rotation's; checkpoints of transformers 4 do not write it."""
    if not read.has("rope_parameters"):
        return 10000.0
    written = read.raw("rope_parameters")
    if not isinstance(written, Mapping):
        raise read.wrong("rope_parameters", written, "an object")
    rope = Reader(written, where="config: vision_config: rope_parameters")
    refuse_other_than(rope, "rope_type", "axial")
    return rope.number("rope_theta", 1.0, 1e12, default=10000.0)


def _out_hidden_size(config: Mapping[str, Any], read: Reader) -> int:
    width = read.integer("out_hidden_size", 1, MAX_HIDDEN_SIZE, default=3584)
    # Configs of transformers 4 have the language model's fields beside the section.
    text = config.get("text_config") or config
    wanted = text.get("hidden_size") if isinstance(text, Mapping) else None
    if wanted is not None and wanted != width:
        raise CheckpointError(
            f"config: vision_config: out_hidden_size={width}, but the hidden_size of the language "
            f"model is {wanted!r}"
        )
    return width
