"""LLaVA 1.5 and LLaVA-NeXT (arXiv 2310.03744): the config of language model and tower."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from octavo.config.families.llama import read_llama
from octavo.config.families.mistral import read_mistral
from octavo.config.families.vision_llava import read_llava_next_vision, read_llava_vision
from octavo.config.families.vision_shapes import VisionConfig
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader
from octavo.errors import CheckpointError

TextReader = Callable[[Reader], ModelConfig]
# By transformers' `model_type`: who reads the section, and the defaults of transformers' config
# class, which published checkpoints leave out. All of them have Llama's names and wiring.
TEXT_MODELS: dict[str, tuple[TextReader, dict[str, Any]]] = {
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
    return with_vision(read, "llava", vision, text=_read_text(read))


def read_llava_next(read: Reader) -> ModelConfig:
    """`LlavaNextForConditionalGeneration`."""
    vision = read_llava_next_vision(read.everything())
    return with_vision(read, "llava_next", vision, text=_read_text(read))


def with_vision(
    read: Reader, architecture: str, vision: VisionConfig, *, text: ModelConfig
) -> ModelConfig:
    """A language model that reads rows of an encoder in the places of its image tokens."""
    name = "image_token_id" if read.has("image_token_id") else "image_token_index"
    places = read.token_ids(name, text.vocab_size)
    if len(places) != 1:
        raise CheckpointError("config: neither image_token_id nor image_token_index names a token")
    return replace(text, architecture=architecture, vision=vision, image_token_id=places[0])


def _read_text(read: Reader) -> ModelConfig:
    """The language model, as the section and, for some fields, the config around it say."""
    read.refuse_unless_neutral("quantization_config")
    section = read.raw("text_config")
    kind = section.get("model_type") or "llama"
    if not isinstance(kind, str) or kind not in TEXT_MODELS:
        supported = f"supported: {', '.join(TEXT_MODELS)}"
        raise read.unsupported("text_config: model_type", kind, supported)
    read_text, defaults = TEXT_MODELS[kind]
    around = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id")
    outer = {name: read.raw(name) for name in around if read.has(name)}
    return read_text(read.over(defaults | section | outer))
