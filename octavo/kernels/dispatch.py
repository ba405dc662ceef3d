"""Which implementation of an op runs: an ordered list of "can you?" predicates over one `Case`.

Owns the choice and its explanation. Knows nothing of any op, of layers or of models. A layer asks
once, when it is built, keeps `choice.function` and calls that directly on the hot path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

F = TypeVar("F")

REFERENCE = "reference"

_references_only = False


@dataclass(frozen=True)
class Case:
    """What an implementation may ask about before it says that it can run."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # of the activations
    sizes: Mapping[str, int] = field(default_factory=dict)  # e.g. {"head_dim": 64}

    def __str__(self) -> str:
        sizes = "".join(f" {name}={value}" for name, value in self.sizes.items())
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}{sizes}"


@dataclass(frozen=True)
class Choice(Generic[F]):
    """The implementation that `Op.select` picked, and why those before it were passed over."""

    op: str
    name: str
    function: F
    passed_over: tuple[tuple[str, str], ...]  # (implementation, reason), in the order tried

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.op}: {self.name}" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class _Implementation(Generic[F]):
    name: str
    load: Callable[[], F]
    unsupported: Callable[[Case], str | None]


class Op(Generic[F]):
    """One operation: a reference that supports every case, and faster versions tried before it."""

    def __init__(self, name: str, reference: F):
        self.name = name
        self.reference = reference
        self._implementations: list[_Implementation[F]] = []

    def register(self, name: str, function: F, unsupported: Callable[[Case], str | None]) -> None:
        """Adds a version, tried after those registered earlier and before the reference.

        `unsupported` returns None when the version can run a case, else the reason why not.
        """
        self._add(_Implementation(name, lambda: function, unsupported))

    def register_module(
        self, name: str, target: str, unsupported: Callable[[Case], str | None]
    ) -> None:
        """As `register`, with a function named "package.module:function".

        The module is imported when the version is first chosen, so what it needs may be missing.
        """
        module, _, function = target.partition(":")
        self._add(
            _Implementation(
                name, lambda: getattr(importlib.import_module(module), function), unsupported
            )
        )

    def _add(self, new: _Implementation[F]) -> None:
        if new.name == REFERENCE or any(known.name == new.name for known in self._implementations):
            raise ValueError(f"{self.name} already has an implementation called {new.name!r}")
        self._implementations.append(new)

    def names(self) -> tuple[str, ...]:
        """All implementations in the order in which they are tried; the reference is last."""
        return (*(known.name for known in self._implementations), REFERENCE)

    def select(self, case: Case) -> Choice[F]:
        passed_over: list[tuple[str, str]] = []
        for candidate in self._implementations:
            reason = "only references were asked for"
            if not _references_only:
                verdict = candidate.unsupported(case)
                if verdict is None:
                    return Choice(self.name, candidate.name, candidate.load(), tuple(passed_over))
                reason = verdict
            passed_over.append((candidate.name, reason))
        return Choice(self.name, REFERENCE, self.reference, tuple(passed_over))


def needs_cpu(case: Case) -> str | None:
    """For `register`: why what reads tensors as the host's memory cannot run a case."""
    return None if case.device == "cpu" else f"made for cpu, not {case.device}"


@contextmanager
def reference_only() -> Iterator[None]:
    """Within it every `select` chooses the reference. For tests, ablation and bug hunts."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before
