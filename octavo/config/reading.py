"""Typed access to a `config.json` that nobody has checked yet, and what most families share of it.

A value of the wrong type or size is refused, and so is, by its name, every option that our layers
would silently get wrong. Nothing in a config is ever executed.
"""

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

ROPE_TYPES = ("default", "linear", "llama3")
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

    def rope(self, head_dim: int) -> Rope:
        """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
        if head_dim % 2:
            raise CheckpointError(
                f"{self._where}: head_dim={head_dim} is odd, so it cannot be rotated"
            )
        rope: dict[str, Any] = {"rope_theta": self._config.get("rope_theta")}
        for name in ("rope_scaling", "rope_parameters"):
            section = self._config.get(name)
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise self.wrong(name, section, "an object")
            rope |= section
        read = Reader(rope, where=f"{self._where}: rope")
        read.refuse_unless_neutral("partial_rotary_factor")
        theta = read.number("rope_theta", 1.0, 1e12, default=10000.0)
        return Rope(theta, head_dim, _rope_scaling(read))

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
        return CheckpointError(f"{self._where}: {name}={short(value)}, but it must be {expected}")

    def unsupported(self, name: str, value: object, supported: str) -> UnsupportedModelError:
        """The error for a sound value that our layers do not have."""
        return UnsupportedModelError(
            f"{self._where}: {name}={short(value)} is not supported, {supported}"
        )

    def _get(self, name: str, default: object) -> Any:
        value = self._config.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self._where}: {name!r} is missing")
        return default if value is None else value


def _rope_scaling(read: Reader) -> RopeScaling | None:
    kind = read.raw("rope_type") or read.raw("type") or "default"
    if kind not in ROPE_TYPES:
        raise read.unsupported("rope_type", kind, f"supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    factor = read.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeScaling(kind, factor)
    low = read.number("low_freq_factor", 1e-6, 1e6)
    high = read.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise CheckpointError("config: rope: high_freq_factor is not above low_freq_factor")
    original = read.integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    return RopeScaling(kind, factor, low, high, original)


def short(value: object) -> str:
    """A config's value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
