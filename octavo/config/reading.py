"""Typed access to a `config.json` that nobody has checked yet, and what most families share of it.

A value of the wrong type or size is refused, and so is, by its name, every option that our layers
would silently get wrong. Nothing in a config is ever executed.
"""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

from octavo.config.model import DTYPES, Rope, RopeScaling
from octavo.errors import CheckpointError, UnsupportedModelError

# Far above any real model, and small enough that a lie is caught before it is allocated.
MAX_VOCAB_SIZE = 2**22
MAX_HIDDEN_SIZE = 2**18
MAX_LAYERS = 2**10
MAX_HEADS = 2**12
MAX_HEAD_DIM = 2**10
MAX_POSITIONS = 2**28

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
FULL = "full_attention"  # of transformers' `layer_types`

# Options with a neutral value; anything else would change the model's arithmetic. A family that
# reads one of them says so.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}


class Reader:
    """A mapping whose values are checked as they are asked for. `null` counts as absent."""

    def __init__(
        self,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        *,
        where: str = "config",
    ):
        self._config = config
        self._generation_config = generation_config or {}
        self._where = where

    def has(self, name: str) -> bool:
        """Whether there is a value."""
        return self._config.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as it stands there, for a family to check; None where there is none."""
        return self._config.get(name)

    def everything(self) -> dict[str, Any]:
        """A copy of all that stands there, unchecked."""
        config = copy.copy(self._config)  # of its own kind: it may note what is asked of it
        return config if isinstance(config, dict) else dict(config)

    def over(self, config: Mapping[str, Any]) -> "Reader":
        """Other words for the same model, with the same generation config beside them."""
        return Reader(config, self._generation_config, where=self._where)

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        """A whole number in low..high."""
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, value, f"an integer in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float, *, default: float | None = None) -> float:
        """A finite number in low..high."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, value, f"a number in {low}..{high}")
        return float(value)

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` finite numbers in low..high."""
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(name, value, f"a list of {count} numbers")
        for number in value:
            if type(number) not in (int, float) or not low <= number <= high:
                raise self.wrong(name, value, f"made of numbers in {low}..{high}")
        return tuple(map(float, value))

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them."""
        value = self._config.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise self.wrong(name, value, f"made of token ids in 0..{vocab_size - 1}")
        return tuple(ids)

    def eos_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The ends of sequence of the config and of the `generation_config.json` beside it."""
        generation = Reader(self._generation_config, where="generation_config")
        ids = self.token_ids("eos_token_id", vocab_size)
        return tuple(dict.fromkeys(ids + generation.token_ids("eos_token_id", vocab_size)))

    def dtype(self) -> str:
        """`dtype` (transformers 5) or `torch_dtype` (4). Absent means float32, as there."""
        value = self._config.get("dtype") or self._config.get("torch_dtype") or "float32"
        if not isinstance(value, str):
            raise self.wrong("dtype", value, "a string")
        name = value.removeprefix("torch.")
        if name not in DTYPES:
            raise self.unsupported("dtype", value, f"supported: {', '.join(DTYPES)}")
        return name

    def heads(self, hidden_size: int, *, default_dim: int | None = None) -> tuple[int, int, int]:
        """(query heads, key and value heads, numbers in a head)

        Args:
            hidden_size: of the model; over the query heads it is the usual size of one.
            default_dim: the size of a head where the family has a constant for it.
        """
        num_heads = self.integer("num_attention_heads", 1, MAX_HEADS)
        num_kv_heads = self.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{self._where}: num_attention_heads={num_heads} is no multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        if default_dim is None and hidden_size % num_heads == 0:
            default_dim = hidden_size // num_heads
        if default_dim is None and not self.has("head_dim"):
            raise CheckpointError(
                f"{self._where}: hidden_size={hidden_size} is no multiple of "
                f"num_attention_heads={num_heads}, and there is no head_dim"
            )
        return (
            num_heads,
            num_kv_heads,
            self.integer("head_dim", 1, MAX_HEAD_DIM, default=default_dim),
        )

    def rope(
        self,
        head_dim: int,
        *,
        fraction: str | None = None,
        default_fraction: float = 1.0,
        theta: str = "rope_theta",
        default_theta: float = 10000.0,
        old_names: Mapping[str, str] | None = None,
    ) -> Rope:
        """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

        Args:
            head_dim: numbers in a head.
            fraction: the family's name of the part of a head that turns, where it may be one.
            default_fraction: where that is not written.
            theta: the family's name of `rope_theta` in the style of transformers 4.
            default_theta: where that is not written.
            old_names: of kinds of scaling, to those of today.
        """
        rope: dict[str, Any] = {"rope_theta": self._config.get(theta)}
        for name in ("rope_scaling", "rope_parameters"):
            section = self._config.get(name)
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise self.wrong(name, section, "an object")
            rope |= section
        # The model's own word on its contexts comes before the section's.
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            rope |= {name: self._config[name]} if self.has(name) else {}
        if fraction is not None and rope.get("partial_rotary_factor") is None:
            rope["partial_rotary_factor"] = self._config.get(fraction)
        read = Reader(rope, where=f"{self._where}: rope")
        if fraction is None:
            read.refuse_unless_neutral("partial_rotary_factor")
        part = read.number("partial_rotary_factor", 0.0, 1.0, default=default_fraction)
        rotary_dim = int(head_dim * part)
        if rotary_dim % 2 or not rotary_dim:
            raise CheckpointError(
                f"{self._where}: {rotary_dim} numbers of heads with head_dim={head_dim} cannot be "
                "rotated: it must be an even number of them"
            )
        base = read.number("rope_theta", 1.0, 1e12, default=default_theta)
        return Rope(base, rotary_dim, _rope_scaling(read, rotary_dim, old_names or {}))

    def refuse_unless_neutral(self, *names: str) -> None:
        """Refuse options of NEUTRAL, by their names, that would change the arithmetic."""
        for name in names:
            neutral = NEUTRAL[name]
            if self._config.get(name) not in neutral:
                raise self.unsupported(name, self._config[name], f"only {neutral[0]!r}")

    def refuse_what_nobody_reads(self, *, read: Collection[str] = ()) -> None:
        """Refuse all options of NEUTRAL that are not, and that the family does not `read`."""
        self.refuse_unless_neutral(*(name for name in NEUTRAL if name not in read))

    def refuse_mixed_layers(self) -> None:
        """Refuse `layer_types` other than full attention in every layer."""
        kinds = self._config.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or kinds.count(FULL) != len(kinds)):
            raise self.unsupported("layer_types", kinds, f"only {FULL!r} for every layer")

    def wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        """The error for a value that is damaged."""
        error = CheckpointError(f"{self._where}: {name}={short(value)}, but it must be {expected}")
        error.field = name
        return error

    def unsupported(self, name: str, value: object, supported: str) -> UnsupportedModelError:
        """The error for a sound value that our layers do not have."""
        error = UnsupportedModelError(
            f"{self._where}: {name}={short(value)} is not supported, {supported}"
        )
        error.field = name
        return error

    def _get(self, name: str, default: object) -> Any:
        value = self._config.get(name)
        if value is None and default is None:
            error = CheckpointError(f"{self._where}: {name!r} is missing")
            error.field = name
            raise error
        return default if value is None else value


def _rope_scaling(
    read: Reader, rotary_dim: int, old_names: Mapping[str, str]
) -> RopeScaling | None:
    kind = read.raw("rope_type") or read.raw("type") or "default"
    kind = old_names.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_TYPES:
        raise read.unsupported("rope_type", kind, f"supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    if kind == "yarn":
        return _yarn(read)
    if kind == "longrope":
        return _longrope(read, rotary_dim // 2)
    factor = read.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeScaling(kind, factor)
    low = read.number("low_freq_factor", 1e-6, 1e6)
    high = read.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise CheckpointError("config: rope: high_freq_factor is not above low_freq_factor")
    original = read.integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    return RopeScaling(kind, factor, low, high, original)


def _yarn(read: Reader) -> RopeScaling:
    """As transformers reads it, DeepSeek's `mscale` and `mscale_all_dim` included."""
    original, factor = _stretch(read)
    attention_factor = _yarn_scale(factor, 1.0)
    scales = [read.number(name, 0.0, 1e3, default=0.0) for name in ("mscale", "mscale_all_dim")]
    if all(scales):
        attention_factor = _yarn_scale(factor, scales[0]) / _yarn_scale(factor, scales[1])
    beta_fast = read.number("beta_fast", 1e-3, 1e6, default=32.0)
    beta_slow = read.number("beta_slow", 1e-3, 1e6, default=1.0)
    if beta_fast <= beta_slow:
        raise CheckpointError("config: rope: beta_fast is not above beta_slow")
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        attention_factor=read.number("attention_factor", 1e-3, 1e3, default=attention_factor),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=read.boolean("truncate", True),
    )


def _longrope(read: Reader, num_pairs: int) -> RopeScaling:
    original, factor = _stretch(read)
    attention_factor = 1.0
    if factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        attention_factor=read.number("attention_factor", 1e-3, 1e3, default=attention_factor),
        short_factors=read.numbers("short_factor", num_pairs, 1e-3, 1e6),
        long_factors=read.numbers("long_factor", num_pairs, 1e-3, 1e6),
    )


def _stretch(read: Reader) -> tuple[int, float]:
    """(positions of the original context, how many times as many there are now)"""
    longest = read.integer("max_position_embeddings", 1, MAX_POSITIONS)
    name = "original_max_position_embeddings"
    original = read.integer(name, 2, MAX_POSITIONS, default=longest)
    return original, read.number("factor", 1e-6, 1e6, default=longest / original)


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def short(value: object) -> str:
    """A config's value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
