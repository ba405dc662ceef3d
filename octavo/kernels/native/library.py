"""Loads the compiled library and declares its functions to ctypes.

Owns the C signatures. Does not know what any function computes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch  # noqa: F401  loads torch's libgomp first, so that both share one pool of threads

POINTER, INT, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

# Name in C without the prefix -> parameter types, in the order of the C++ declaration. All return
# nothing; the last parameter of each is the number of threads.
SIGNATURES: dict[str, list[type]] = {
    "rms_norm": [POINTER, INT64, POINTER, POINTER, POINTER, INT64, INT64, FLOAT, INT],
    "silu_mul": [POINTER, INT64, POINTER, INT64, INT64, INT],
    "rotary_kv_write": [
        *[POINTER, INT64, INT64, INT64],  # query, its strides, heads
        *[POINTER, INT64, INT64],  # key
        *[POINTER, INT64, INT64, INT64],  # value, its strides, kv heads
        *[POINTER, POINTER],  # positions, cos_sin
        *[POINTER, INT64, INT64, POINTER],  # kv_cache, blocks, block size, slots
        *[INT64, INT64, INT],  # tokens, dim
    ],
    "paged_attention": [
        *[POINTER, INT64, INT64, POINTER],  # query, its strides, kv_cache
        *[POINTER, POINTER, POINTER, POINTER],  # query_starts, context_lens, block_tables, out
        *[INT64] * 6,  # batch, table width, blocks, heads, kv heads, dim
        *[FLOAT, INT],
    ],
}
LINEAR_SIGNATURE: list[type] = [POINTER, INT64, *[POINTER] * 3, *[INT64] * 4, INT, INT]


class Library:
    """The C functions as attributes, one per op and dtype: `library.rms_norm_bf16(...)`."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        for op, signature in SIGNATURES.items():
            for suffix in ("bf16", "fp32"):
                self._bind(f"{op}_{suffix}", signature)
        self._bind("linear_bf16", LINEAR_SIGNATURE)

    def _bind(self, name: str, signature: list[type]) -> None:
        function = self._handle[f"octavo_{name}"]
        function.argtypes, function.restype = signature, None
        setattr(self, name, function)

    def features(self) -> tuple[str, ...]:
        """What was compiled in and may be used, for example ("avx512", "avx512_bf16")."""
        words = self._handle["octavo_features"]
        words.argtypes, words.restype = [], ctypes.c_char_p
        granted = self._handle["octavo_amx"]
        granted.argtypes, granted.restype = [], INT
        return (*words().decode().split(), *(("amx_bf16",) if granted() else ()))
