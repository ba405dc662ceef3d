"""Loads the compiled library and packs the arguments of its functions.

Owns the C signatures. Does not know what any function computes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # loaded first, so that the library shares torch's libgomp and its pool of threads

# Op -> the fields of its C++ struct in order, as `struct` formats: q is a pointer, count or stride
# (a null pointer is 0), d a double. One packed argument costs a fifth of what ctypes takes to
# convert the fields one by one, and a decode step makes hundreds of calls.
LAYOUTS = {
    "linear": "10q",  # LinearCall
    "rms_norm": "7qdqq",  # RmsNormCall
    "silu_mul": "6q",  # GateCall
    "gelu_tanh_mul": "6q",  # GateCall
    "rotary_kv_write": "22q",  # RotaryKvWriteCall
    "paged_attention": "14qdqdqq",  # Attention
}
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

Call = Callable[..., None]


class ByDtype(dict[torch.dtype, Call]):
    """The versions of one function; asking for a dtype without one is a TypeError."""

    def __init__(self, op: str, calls: dict[torch.dtype, Call]):
        super().__init__(calls)
        self.op = op

    def __missing__(self, dtype: torch.dtype) -> Call:
        raise TypeError(f"{self.op} has no compiled kernel for {dtype}")


class Library:
    """The compiled functions: `library.rms_norm[x.dtype](x.data_ptr(), ...)`."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        self.linear = self._bind("linear")
        self.rms_norm = self._bind("rms_norm")
        self.silu_mul = self._bind("silu_mul")
        self.gelu_tanh_mul = self._bind("gelu_tanh_mul")
        self.rotary_kv_write = self._bind("rotary_kv_write")
        self.paged_attention = self._bind("paged_attention")

    def _bind(self, op: str) -> ByDtype:
        calls = {
            dtype: _caller(self._handle[f"octavo_{op}_{suffix}"], LAYOUTS[op])
            for dtype, suffix in SUFFIXES.items()
        }
        return ByDtype(op, calls)

    def features(self) -> tuple[str, ...]:
        """What was compiled in and may be used, for example ("avx512", "avx512_bf16")."""
        words = self._handle["octavo_features"]
        words.argtypes, words.restype = [], ctypes.c_char_p
        granted = self._handle["octavo_amx"]
        granted.argtypes, granted.restype = [], ctypes.c_int
        return (*words().decode().split(), *(("amx_bf16",) if granted() else ()))


def _caller(function: Any, layout: str) -> Call:
    function.argtypes, function.restype = [ctypes.c_char_p], None
    pack = struct.Struct(layout).pack

    def call(*fields: float) -> None:
        function(pack(*fields))

    return call
