"""Granite 3.x: what its `config.json` says. Knows no torch."""

from dataclasses import dataclass, fields, replace

from octavo.config import ModelConfig
from octavo.config.families.llama import read_llama
from octavo.config.reading import Reader

LARGEST = 1e6  # of the multipliers: far above those of real models


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteConfig(ModelConfig):
    """What `octavo.config.ModelConfig` has no word for (arXiv 2408.13359, section 3)."""

    embedding_multiplier: float  # embeddings are multiplied by it
    residual_multiplier: float  # and what a block adds to the residual stream
    logits_scaling: float  # logits are divided by it


def read_granite(read: Reader) -> GraniteConfig:
    """`GraniteForCausalLM`: Llama's words, and four multipliers."""
    llama = read_llama(read)
    scale = read.number("attention_multiplier", 0.0, LARGEST, default=1.0)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, scale=scale)) for layer in llama.layers
    )
    values = {field.name: getattr(llama, field.name) for field in fields(ModelConfig)}
    return GraniteConfig(
        **values | {"architecture": "granite", "layers": layers},
        embedding_multiplier=read.number("embedding_multiplier", 0.0, LARGEST, default=1.0),
        residual_multiplier=read.number("residual_multiplier", 0.0, LARGEST, default=1.0),
        logits_scaling=read.number("logits_scaling", 1e-6, LARGEST, default=1.0),
    )
