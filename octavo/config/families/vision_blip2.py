"""The vision part of BLIP-2, which MiniGPT-4 took over: a tower, a Q-Former, a projection."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config.families.vision_fields import (
    activation,
    check_heads,
    refuse_other_than,
    section,
    text_hidden_size,
    vit,
)
from octavo.config.families.vision_shapes import Blip2VisionConfig, QFormerConfig
from octavo.config.model import MLPConfig
from octavo.config.reading import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_LAYERS, Reader
from octavo.errors import CheckpointError

MAX_QUERIES = 2**12
# Those of transformers' Blip2VisionConfig: the EVA tower.
EVA_DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


def read_blip2_vision(config: Mapping[str, Any]) -> Blip2VisionConfig:
    """`Blip2ForConditionalGeneration`. The language model's end is not looked at."""
    read = Reader(config)
    read_tower = section(config, "vision_config")
    refuse_other_than(read_tower, "model_type", "blip_2_vision_model")
    tower = vit(read_tower, EVA_DEFAULTS)
    return Blip2VisionConfig(
        tower=replace(tower, qkv_bias=read_tower.boolean("qkv_bias", True)),
        qformer=_qformer(
            section(config, "qformer_config"),
            image_width=tower.hidden_size,
            num_queries=read.integer("num_query_tokens", 1, MAX_QUERIES, default=32),
        ),
        out_hidden_size=text_hidden_size(config),
    )


def _qformer(read: Reader, *, image_width: int, num_queries: int) -> QFormerConfig:
    refuse_other_than(read, "model_type", "blip_2_qformer")
    # Instructions beside the queries are InstructBLIP's.
    refuse_other_than(read, "use_qformer_text_input", False)
    refuse_other_than(read, "position_embedding_type", "absolute")
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE, default=768)
    num_heads = read.integer("num_attention_heads", 1, MAX_HEADS, default=12)
    check_heads(read, hidden_size, num_heads)
    if read.integer("encoder_hidden_size", 1, MAX_HIDDEN_SIZE, default=image_width) != image_width:
        raise CheckpointError(
            f"config: qformer_config: encoder_hidden_size={read.raw('encoder_hidden_size')}, but "
            f"the hidden_size of vision_config is {image_width}"
        )
    return QFormerConfig(
        hidden_size=hidden_size,
        num_layers=read.integer("num_hidden_layers", 1, MAX_LAYERS, default=12),
        num_heads=num_heads,
        mlp=MLPConfig(
            read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE, default=3072),
            bias=True,
            activation=activation(read, "hidden_act", "gelu"),
            gated=False,
        ),
        norm_eps=read.number("layer_norm_eps", 0.0, 1.0, default=1e-12),
        cross_attention_every=read.integer("cross_attention_frequency", 1, MAX_LAYERS, default=2),
        num_queries=num_queries,
    )
