"""Kernels that are compiled before they are launched, with stand-ins for Triton's own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import _async_compile

from octavo.config import decode_sizes, mixed_sizes
from octavo.kernels import triton_launch
from octavo.kernels.block_sizes import ROW_BUCKETS, bucket
from octavo.kernels.triton_attention_tile import counted_at_once
from octavo.kernels.triton_decode_attention import SMALL_BATCH
from octavo.kernels.triton_launch import compile_ahead, launch
from octavo.runner.memory import _one_of_each_kind


class Kernel:
    """Is compiled for what it is asked for, as a JITFunction, and notes it."""

    def __init__(self, compile_kernel=lambda: None):
        self._compile = compile_kernel
        self.variants = []
        self.ready = []  # (variant, device) of those that need only be called
        self.most_at_once = 0
        self._at_once = 0

    def __getitem__(self, grid):
        raise AssertionError("nothing runs")

    def run(self, *args, grid, warmup, **options):
        assert warmup
        variant = tuple(sorted(options.items()))
        self.variants.append(variant)
        _async_compile.active_mode.get().submit(
            (id(self), variant), lambda: self._compiled(variant), lambda compiled: None
        )

    def _compiled(self, variant):
        self._compile()
        return Compiled(self, variant)

    def make_ready(self, variant):
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(0.01)
        self._at_once -= 1
        self.ready.append((variant, torch.cuda.current_device()))


class Compiled:
    def __init__(self, kernel, variant):
        self.src = SimpleNamespace(fn=kernel)
        self._variant = variant

    def __getitem__(self, grid):
        self.src.fn.make_ready(self._variant)
        return lambda *args: pytest.fail("nothing runs")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    """Each thread has a device of its own, the first unless it says otherwise; this one the 3rd."""
    own = threading.local()
    started: Future[object] = Future()
    started.set_result(None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(own, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(own, "device", device))
    monkeypatch.setattr(triton_launch, "start_compiler", lambda: started)
    torch.cuda.set_device(2)
    yield
    _async_compile.active_mode.set(None)  # Triton forgets to, where a kernel was not compiled


def test_each_variant_is_asked_for_once_and_ready_on_this_device_at_the_end():
    kernel, other = Kernel(), Kernel()
    x = torch.zeros(4)
    with compile_ahead(3):
        for count in (32, 64, 48):  # alike to a compiler
            launch(kernel, (1,))(x, count, BLOCK=16)
            launch(other, (count,))(x, count, BLOCK=16)
        launch(kernel, (1,))(x, 32, BLOCK=32)
        launch(kernel, (1,))(x, 33, BLOCK=32)
    assert kernel.variants == [(("BLOCK", size),) for size in (16, 32, 32)]
    assert sorted(kernel.ready) == [((("BLOCK", size),), 2) for size in (16, 32)]
    assert other.ready == [((("BLOCK", 16),), 2)]


def test_what_variants_share_is_made_by_one_of_them():
    kernels = [Kernel(), Kernel()]
    with compile_ahead(8):
        for block in range(6):
            for kernel in kernels:
                launch(kernel, (1,))(BLOCK=block)
    for kernel in kernels:
        assert len(kernel.ready) == 6
        assert kernel.most_at_once == 1


def test_a_kernel_that_cannot_be_compiled_is_told_of_at_the_end():
    def fail():
        raise ValueError("no such instruction")

    broken, sound = Kernel(fail), Kernel()
    with pytest.raises(ValueError, match="no such instruction"), compile_ahead(2):
        launch(broken, (1,))(BLOCK=1)
        launch(sound, (1,))(BLOCK=1)
    with pytest.raises(AssertionError, match="nothing runs"):
        launch(sound, (1,))  # as at any other time


@pytest.mark.parametrize("limit", [1, 3, 37, 256, 300, 512, 8192])
def test_the_sizes_that_are_walked_stand_for_all_sizes(limit):
    def kind(size):
        """All that launchers know of a number of rows or sequences."""
        rows = bucket(size) if size <= ROW_BUCKETS[-1] else None
        return rows, counted_at_once(size), size > SMALL_BATCH

    for sizes in (decode_sizes(limit), mixed_sizes(limit)):
        walked = _one_of_each_kind(sizes)
        assert walked[0] == limit and len(walked) <= 14
        assert {kind(size) for size in walked} == {kind(size) for size in sizes}
