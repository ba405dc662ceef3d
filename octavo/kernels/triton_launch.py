"""How Triton kernels are launched, and compiled before anybody waits for them.

Programmatic dependent launch (CUDA guide, 6.2.8): a kernel starts while the one before it ends.
Between small kernels the launch itself is half of the time. With this, a kernel's programs are
placed, and load what no other kernel writes (weights), while the last programs of the kernel before
still run. Every kernel launched with `launch_options()` calls `wait_for_inputs` before it touches
anything that another kernel wrote or may still read, and `allow_next` as early as it likes: the
next kernel waits for this one's end by itself. Does nothing before Hopper and in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_CAPABILITY = (9, 0)

_asked_for: set[object] | None = None  # within `compile_ahead`: the kernels of this time


@cache
def launch_options() -> dict[str, bool]:
    """Keywords for every launch; kernels take `PDL: tl.constexpr`."""
    interpreted = triton.knobs.runtime.interpret
    if interpreted or torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """`kernel[grid]`: call it with the kernel's arguments. Within `compile_ahead` nothing runs."""
    if _asked_for is None:
        launcher: Callable[..., object] = kernel[grid]
        return launcher
    return lambda *args, **options: _ask_for(kernel, grid, args, options)


def _ask_for(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Have a kernel compiled, unless one like it was asked for: a model's layers are all alike."""
    kinds = tuple(
        arg.dtype
        if isinstance(arg, torch.Tensor)
        else (type(arg), arg == 1, isinstance(arg, int) and arg % 16 == 0)
        for arg in args
    )
    key = (kernel, kinds, tuple(sorted(options.items())))
    if _asked_for is not None and key not in _asked_for:
        _asked_for.add(key)
        kernel.run(*args, grid=grid, warmup=True, **options)


@contextmanager
def compile_ahead(num_threads: int) -> Iterator[None]:
    """Within it kernels that are launched do not run, and are ready to run when it ends.

    They are compiled side by side, or found in Triton's cache on disk, whose entries are named by
    source, device and versions. What the kernels were to write is not written: only sizes, types
    and memory of the results mean anything.
    """
    global _asked_for
    start_compiler().result()
    with _KernelThreads(num_threads) as threads, triton.AsyncCompileMode(threads):
        _asked_for = set()
        try:
            yield
        finally:
            _asked_for = None


class _KernelThreads(ThreadPoolExecutor):
    """Threads that compile kernels, or load them, and do what else their first launch would do.

    Up to Triton 3.6 that is much: a C compiler makes the function that hands a kernel its
    arguments. Threads are enough, as Triton holds the interpreter for a fifth of the time only.
    """

    def __init__(self, num_threads: int):
        device = torch.cuda.current_device()  # of this thread: a new one would take the first
        super().__init__(num_threads, initializer=torch.cuda.set_device, initargs=(device,))
        self._locks: dict[Any, Lock] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return super().submit(lambda: self._ready(fn(*args, **options)))

    def _ready(self, compiled: Any) -> Any:
        # The variants of a kernel get their arguments alike: all but the first find that made.
        with self._locks.setdefault(compiled.src.fn, Lock()):
            _ = compiled[(1, 1, 1)]  # what is to be called with arguments, and is not
        return compiled


@cache
def start_compiler() -> Future[object]:
    """Have a thread compile a first kernel, once in a process; returns at once.

    Before it Triton reads all of its own 400 MB to name what it caches, and has a C compiler make
    its way to the driver: the better part of a second, which can pass beside other work.
    """
    device = torch.cuda.current_device()
    thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
    first: Future[object] = thread.submit(_nothing.warmup, grid=(1,))
    thread.shutdown(wait=False)
    return first


@triton.jit
def _nothing():
    pass


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """All that earlier kernels wrote is there from here on."""
    if PDL:
        gdc_wait()


@triton.jit
def allow_next(PDL: tl.constexpr):
    """The next kernel may be placed as soon as all programs of this one came here or ended."""
    if PDL:
        gdc_launch_dependents()
