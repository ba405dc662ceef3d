"""The CPU kernels: C++ compiled once on the user's machine, called through ctypes.

Owns which library is in use. Without a compiler there is one warning and the references run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from octavo.kernels.native.compiler import BuildError, build
from octavo.kernels.native.library import Library

__all__ = ["NativeKernelWarning", "features", "library", "unavailable", "using"]


class NativeKernelWarning(UserWarning):
    """The compiled CPU kernels cannot be used, so the slow references run."""


_library: Library | None = None
_failure: str | None = None


def unavailable() -> str | None:
    """None when the library is ready (built and loaded on the first call), else the reason."""
    global _library, _failure
    if _library is None and _failure is None:
        try:
            _library = Library(build().path)
        except (BuildError, OSError, AttributeError) as failure:
            _failure = f"the CPU kernels are not available: {failure}"
            warnings.warn(
                f"{_failure}. Octavo runs on plain torch instead, several times slower.",
                NativeKernelWarning,
                stacklevel=2,
            )
    return _failure


def library() -> Library:
    """The library in use. Raises RuntimeError when there is none."""
    if _library is None:
        reason = unavailable()
        if _library is None:
            raise RuntimeError(reason)
    return _library


def features() -> tuple[str, ...]:
    """What the library in use was compiled for, for example ("avx512", "avx512_bf16")."""
    return library().features()


@contextmanager
def using(march: str) -> Iterator[Library]:
    """Within it the kernels are those built for another instruction set, such as x86-64-v3."""
    global _library
    before, _library = _library, Library(build(march).path)
    try:
        yield _library
    finally:
        _library = before
