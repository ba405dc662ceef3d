"""LLaVA 1.5 and LLaVA-NeXT (arXiv 2310.03744): the config of language model and tower."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from octavo.config.families.llama import read_llama
from octavo.config.families.mistral import read_mistral
from octavo.config.families.vision_llava import read_llava_next_vision, read_llava_vision
from octavo.config.families.vision_shapes import VisionConfig
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader
from octavo.errors import CheckpointError

# By transformers' `model_type`: who reads the section, and the defaults of transformers' config
# class, which published checkpoints leave out.
TextModels = Mapping[str, tuple[Callable[[Reader], ModelConfig], dict[str, Any]]]
# What the config around the section may say of the language model.
AROUND = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id")
# All of them have Llama's names and wiring.
TEXT_MODELS: TextModels = {
    "llama": (
        read_llama,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mistral": (
        read_mistral,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def read_llava(read: Reader) -> ModelConfig:
    """`LlavaForConditionalGeneration`."""
    vision = read_llava_vision(read.everything())
    return with_vision(read, "llava", vision, text=read_text(read, TEXT_MODELS))


def read_llava_next(read: Reader) -> ModelConfig:
    """`LlavaNextForConditionalGeneration`."""
    vision = read_llava_next_vision(read.everything())
    return with_vision(read, "llava_next", vision, text=read_text(read, TEXT_MODELS))


def with_vision(
    read: Reader, architecture: str, vision: VisionConfig, *, text: ModelConfig
) -> ModelConfig:
    """A language model that reads rows of an encoder in the places of its image tokens."""
    name = "image_token_id" if read.has("image_token_id") else "image_token_index"
    places = read.token_ids(name, text.vocab_size)
    if len(places) != 1:
        raise CheckpointError("config: neither image_token_id nor image_token_index names a token")
    return replace(text, architecture=architecture, vision=vision, image_token_id=places[0])


def read_text(
    read: Reader, known: TextModels, *, kind: str = "llama", around: tuple[str, ...] = AROUND
) -> ModelConfig:
    """The language model, as the section and, for some fields, the config around it say.

    Args:
        read: the whole config.
        known: language models of the family.
        kind: where the section does not name one.
        around: fields that count where they are written around the section, too.

    Raises:
        UnsupportedModelError: another language model.
        CheckpointError: there is no section.
    """
    read.refuse_unless_neutral("quantization_config")
    section = read.raw("text_config")
    if not isinstance(section, Mapping):
        raise read.wrong("text_config", section, "an object")
    kind = section.get("model_type") or kind
    if not isinstance(kind, str) or kind not in known:
        supported = f"supported: {', '.join(known)}"
        raise read.unsupported("text_config: model_type", kind, supported)
    read_one, defaults = known[kind]
    outer = {name: read.raw(name) for name in around if read.has(name)}
    return read_one(read.over({**defaults, **section, **outer}))
