"""Qwen2.5-VL (arXiv 2502.13923): Qwen2's config with M-RoPE, and the tower beside it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config.families.llava import with_vision
from octavo.config.families.qwen2 import read_qwen2
from octavo.config.families.vision_qwen2_5_vl import read_qwen2_5_vl_vision
from octavo.config.model import LayerConfig, ModelConfig, Rope
from octavo.config.reading import Reader

# Of transformers' config class, where they are not those of Qwen2's.
DEFAULTS = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8}
NUM_AXES = 3  # time, down, across


def read_qwen2_5_vl(read: Reader) -> ModelConfig:
    """`Qwen2_5_VLForConditionalGeneration`."""
    read.refuse_unless_neutral("quantization_config")
    vision = read_qwen2_5_vl_vision(read.everything())
    text, sections = _text(read)
    config = read_qwen2(read.over(text))
    layers = tuple(_sectioned(layer, sections, read) for layer in config.layers)
    seeing = with_vision(read, "qwen2_5_vl", vision, text=replace(config, layers=layers))
    video_token_id = next(iter(read.token_ids("video_token_id", config.vocab_size)), None)
    return replace(seeing, video_token_id=video_token_id)


def _text(read: Reader) -> tuple[dict[str, Any], object]:
    """(the language model in Qwen2's words, `mrope_section` as it stands there)

    transformers 4 has its fields beside the vision section, 5 in a section of their own.
    """
    everything = read.everything()
    section = everything.get("text_config")
    text = DEFAULTS | everything | (dict(section) if isinstance(section, Mapping) else {})
    for name in ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id"):
        if read.has(name):
            text[name] = read.raw(name)
    sections: object = None
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := text.get(name), Mapping):
            sections = rope.get("mrope_section", sections)
            plain = {key: "default" for key in ("type", "rope_type") if rope.get(key) == "mrope"}
            text[name] = {**rope, **plain}
    return text, sections


def _sectioned(layer: LayerConfig, sections: object, read: Reader) -> LayerConfig:
    rope = layer.attention.rope
    if rope is None:
        return layer
    return replace(layer, attention=replace(layer.attention, rope=_turned(rope, sections, read)))


def _turned(rope: Rope, sections: object, read: Reader) -> Rope:
    num_pairs = rope.rotary_dim // 2
    counts = sections if isinstance(sections, list) else []
    if not all(type(count) is int and count >= 0 for count in counts):
        counts = []
    if len(counts) != NUM_AXES or sum(counts) != num_pairs:
        expected = f"{NUM_AXES} numbers with a sum of {num_pairs}, half of what a head rotates"
        raise read.wrong("mrope_section", sections, expected)
    return replace(rope, sections=tuple(counts))
