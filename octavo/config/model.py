"""The shape of a model, read from `config.json` with every value checked.

All quirks of Hugging Face's configs end here. A value of the wrong type or size is refused, and so
is, by its name, every option that our layers would silently get wrong. Nothing in a config is ever
executed: `auto_map` (code from the checkpoint) is ignored for architectures that we have and is no
way in for others. Knows no tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.config.checkpoint import Checkpoint
from octavo.errors import CheckpointError, ModelError, UnsupportedModelError

# {a class name of transformers: our name of the architecture}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Those whose tensors we know by llama.cpp's names, too.
GGUF_ARCHITECTURES = ("llama",)
# Numbers in a head where the config does not say: a constant of transformers, not hidden_size over
# heads.
HEAD_DIMS = {"qwen3": 128}
DTYPES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("default", "linear", "llama3")

# Far above any real model, and small enough that a lie is caught before it is allocated.
MAX_VOCAB_SIZE = 2**22
MAX_HIDDEN_SIZE = 2**18
MAX_LAYERS = 2**10
MAX_HEADS = 2**12
MAX_HEAD_DIM = 2**10
MAX_POSITIONS = 2**28

# Options with a neutral value; anything else would change the model's arithmetic.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}
# Their configs may hold a `sliding_window`, which counts only where `use_sliding_window` is true.
WINDOW_HAS_A_SWITCH = ("qwen3",)
FULL = "full_attention"  # the one of transformers' `layer_types` that we have


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    "linear" divides every frequency by `factor`. "llama3" divides those with a wavelength above
    `original_max_position_embeddings / low_freq_factor`, leaves those below `... /
    high_freq_factor` alone, and interpolates between; the last three fields are its own.
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a decoder-only transformer. Every field is checked."""

    architecture: str  # one of ARCHITECTURES' values
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool  # an RMS norm over each query and key head, before the rotation
    dtype: str  # of the checkpoint: one of DTYPES
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "ModelConfig":
        """Read the config of a located checkpoint. Raises as `from_hf` does."""
        written, generation_config = checkpoint.config(), checkpoint.generation_config()
        try:
            config = cls.from_hf(written, generation_config)
        except ModelError as error:
            raise type(error)(f"{checkpoint.path}: {error}") from error
        if checkpoint.kind == "gguf" and config.architecture not in GGUF_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{checkpoint.path}: GGUF files of {config.architecture!r} are not supported, only "
                f"of {', '.join(GGUF_ARCHITECTURES)}; take the model's safetensors"
            )
        return config

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a `config.json` in the style of transformers 4 or 5.

        Args:
            config: the parsed file.
            generation_config: the parsed `generation_config.json`; its end-of-sequence ids are
                added to those of the config.

        Raises:
            UnsupportedModelError: a sound value that is not supported; the message names it and
                what is supported.
            CheckpointError: a value that is missing, of the wrong type or absurd.
        """
        architecture = _architecture(config)
        _refuse_what_we_would_get_wrong(config, architecture)
        read = _Reader(config)
        hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
        num_heads, num_kv_heads, head_dim = _heads(read, hidden_size, HEAD_DIMS.get(architecture))
        rope_theta, rope_scaling = _rope(config)
        vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE),
            num_layers=read.integer("num_hidden_layers", 1, MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=read.integer("max_position_embeddings", 1, MAX_POSITIONS),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            attention_bias=read.boolean("attention_bias", False),
            mlp_bias=read.boolean("mlp_bias", False),
            qk_norm=architecture == "qwen3",
            dtype=_dtype(config),
            bos_token_id=next(iter(read.token_ids("bos_token_id", vocab_size)), None),
            eos_token_ids=_eos_token_ids(read, generation_config or {}, vocab_size),
        )


class _Reader:
    """Typed access to a mapping that nobody has checked yet. `null` counts as absent."""

    def __init__(self, config: Mapping[str, Any], where: str = "config"):
        self._config = config
        self._where = where

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, value, f"an integer in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self._wrong(name, value, f"a number in {low}..{high}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them."""
        value = self._config.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise self._wrong(name, value, f"made of token ids in 0..{vocab_size - 1}")
        return tuple(ids)

    def _get(self, name: str, default: object) -> Any:
        value = self._config.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self._where}: {name!r} is missing")
        return default if value is None else value

    def _wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {name}={_short(value)}, but it must be {expected}")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if names is None:
        model_type = config.get("model_type")
        known = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
        names = [known or model_type]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config: neither 'architectures' nor 'model_type' names the model")
    if names[0] not in ARCHITECTURES:
        remote = " (it would need code from the checkpoint, which is never run)"
        raise UnsupportedModelError(
            f"the architecture {_short(names[0])} is not supported"
            f"{remote if 'auto_map' in config else ''}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[names[0]]


def _refuse_what_we_would_get_wrong(config: Mapping[str, Any], architecture: str) -> None:
    for name, neutral in NEUTRAL.items():
        if name == "sliding_window" and architecture in WINDOW_HAS_A_SWITCH:
            continue
        if config.get(name) not in neutral:
            raise UnsupportedModelError(
                f"config: {name}={_short(config[name])} is not supported, only {neutral[0]!r}"
            )
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or kinds.count(FULL) != len(kinds)):
        raise UnsupportedModelError(
            f"config: layer_types={_short(kinds)} is not supported, only {FULL!r} for every layer"
        )


def _heads(read: _Reader, hidden_size: int, default_dim: int | None) -> tuple[int, int, int]:
    """(query heads, key and value heads, numbers in a head)"""
    num_heads = read.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = read.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    if default_dim is None and hidden_size % num_heads == 0:
        default_dim = hidden_size // num_heads
    if default_dim is None and not read.has("head_dim"):
        raise CheckpointError(
            f"config: hidden_size={hidden_size} is no multiple of "
            f"num_attention_heads={num_heads}, and there is no head_dim"
        )
    head_dim = read.integer("head_dim", 1, MAX_HEAD_DIM, default=default_dim)
    if head_dim % 2:
        raise CheckpointError(f"config: head_dim={head_dim} is odd, so it cannot be rotated")
    return num_heads, num_kv_heads, head_dim


def _dtype(config: Mapping[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4). Absent means float32, as in transformers."""
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(value, str):
        raise CheckpointError(f"config: dtype={_short(value)}, but it must be a string")
    name = value.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(
            f"config: dtype={_short(value)} is not supported; supported: {', '.join(DTYPES)}"
        )
    return name


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise CheckpointError(f"config: {name}={_short(section)}, but it must be an object")
        rope |= section
    read = _Reader(rope, "config: rope")
    theta = read.number("rope_theta", 1.0, 1e12, default=10000.0)
    if rope.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise UnsupportedModelError("config: rope: partial_rotary_factor is not supported, only 1")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"config: rope_type={_short(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return theta, None
    factor = read.number("factor", 1.0, 1e6)
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    low = read.number("low_freq_factor", 1e-6, 1e6)
    high = read.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise CheckpointError("config: rope: high_freq_factor is not above low_freq_factor")
    original = read.integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    return theta, RopeScaling(kind, factor, low, high, original)


def _eos_token_ids(
    read: _Reader, generation_config: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    generation = _Reader(generation_config, "generation_config")
    ids = read.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids + generation.token_ids("eos_token_id", vocab_size)))


def _short(value: object) -> str:
    """A config's value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
