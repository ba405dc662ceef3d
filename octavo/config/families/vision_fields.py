"""What the readers of vision configs share: sections, activations, the language model's width."""

from collections.abc import Mapping
from typing import Any

from octavo.config.families.vision_shapes import ViTConfig
from octavo.config.model import MLPConfig
from octavo.config.reading import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_LAYERS, Reader, short
from octavo.errors import CheckpointError

MAX_IMAGE_SIZE = 2**13  # pixels on a side
MAX_PATCH_SIZE = 2**8

# transformers' `hidden_act` and our name.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# `hidden_size` of transformers' config classes, which checkpoints leave out.
TEXT_HIDDEN_SIZES = {"llama": 4096, "mistral": 4096, "opt": 768}


def section(config: Mapping[str, Any], name: str) -> Reader:
    """An object inside of a config.

    Raises:
        CheckpointError: it is missing, or is no object.
    """
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config: {name}={short(value)}, but it must be an object")
    return Reader(value, where=f"config: {name}")


def activation(read: Reader, name: str, default: str) -> str:
    """The activation of a plain MLP, in our words."""
    written = read.raw(name) or default
    if not isinstance(written, str) or written not in ACTIVATIONS:
        raise read.unsupported(name, written, f"supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[written]


def text_hidden_size(config: Mapping[str, Any]) -> int:
    """The width of the language model that the image tokens go to."""
    read = section(config, "text_config")
    kind = read.raw("model_type") or "llama"
    default = TEXT_HIDDEN_SIZES.get(kind) if isinstance(kind, str) else None
    return read.integer("hidden_size", 1, MAX_HIDDEN_SIZE, default=default)


def refuse_other_than(read: Reader, name: str, *supported: object) -> None:
    """Refuse a value that is there and none of those."""
    if read.has(name) and read.raw(name) not in supported:
        raise read.unsupported(name, read.raw(name), f"only {' or '.join(map(repr, supported))}")


def check_heads(read: Reader, hidden_size: int, num_heads: int) -> None:
    """Refuse a width that the heads cannot share."""
    if hidden_size % num_heads:
        raise read.wrong("hidden_size", hidden_size, f"a multiple of the {num_heads} heads")


def vit(read: Reader, defaults: Mapping[str, Any]) -> ViTConfig:
    """A vision transformer under its usual names.

    Args:
        read: the `vision_config`.
        defaults: those of transformers' config class.
    """
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE, default=defaults["hidden_size"])
    num_heads = read.integer(
        "num_attention_heads", 1, MAX_HEADS, default=defaults["num_attention_heads"]
    )
    check_heads(read, hidden_size, num_heads)
    size = defaults["intermediate_size"]
    mlp = MLPConfig(
        read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE, default=size),
        bias=True,
        activation=activation(read, "hidden_act", defaults["hidden_act"]),
        gated=False,
    )
    image_size = read.integer("image_size", 1, MAX_IMAGE_SIZE, default=defaults["image_size"])
    patch_size = read.integer("patch_size", 1, MAX_PATCH_SIZE, default=defaults["patch_size"])
    if patch_size > image_size:
        raise read.wrong("patch_size", patch_size, f"at most the image_size, {image_size}")
    num_layers = defaults["num_hidden_layers"]
    return ViTConfig(
        hidden_size=hidden_size,
        num_layers=read.integer("num_hidden_layers", 1, MAX_LAYERS, default=num_layers),
        num_heads=num_heads,
        mlp=mlp,
        image_size=image_size,
        patch_size=patch_size,
        norm_eps=read.number("layer_norm_eps", 0.0, 1.0, default=defaults["layer_norm_eps"]),
    )
