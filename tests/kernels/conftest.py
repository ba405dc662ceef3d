"""Runs each test that asks for `isa` once for every build of the kernels this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.kernels import native


def _runnable() -> list[str]:
    """Instruction sets from the machine's own down to those that force the portable code."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    sets = ["native"]
    if "amx_bf16" in flags:
        sets.append("cooperlake")  # bf16 products without the tiles
    if "avx2" in flags:
        sets.append("x86-64-v3")
    if "sse2" in flags:
        sets.append("x86-64")
    return sets


@pytest.fixture(params=_runnable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    with native.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        poison = torch.ones(1).new_empty(7)
        if not poison.isnan().all():
            raise RuntimeError("torch.utils.deterministic.fill_uninitialized_memory is off")
        yield
    finally:
        torch.use_deterministic_algorithms(False)
