"""What configs say of sliding windows: which layers have one, how long it is, what a null means.

Used by the families that have windows; the others refuse them (`Reader.refuse_what_nobody_reads`).
"""

from collections.abc import Sequence

from octavo.config.reading import FULL, MAX_POSITIONS, Reader

SLIDING = "sliding_attention"  # of transformers' `layer_types`, beside FULL


def is_null(read: Reader, name: str) -> bool:
    """Whether a null is written, where that means something else than nothing does."""
    return name in read.everything() and not read.has(name)


def layer_types(read: Reader, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, each FULL or SLIDING; `default` where the config has none."""
    kinds = read.raw("layer_types") if read.has("layer_types") else list(default)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise read.wrong("layer_types", kinds, f"one for each of {num_layers} layers")
    if not all(kind in (FULL, SLIDING) for kind in kinds):
        raise read.unsupported("layer_types", kinds, f"only {FULL!r} and {SLIDING!r}")
    return tuple(kinds)


def sliding_window(read: Reader, default: int) -> int | None:
    """Tokens that a query sees. None for a null, and where no context is longer."""
    if is_null(read, "sliding_window"):
        return None
    window = read.integer("sliding_window", 1, MAX_POSITIONS, default=default)
    longest = read.integer("max_position_embeddings", 1, MAX_POSITIONS)
    return window if window < longest else None
