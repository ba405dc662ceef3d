"""Measures which block sizes multiply fastest by weights of given shapes on the GPU at hand.

Owns the candidates and how they are timed: many calls in a CUDA graph, over copies of the weight
that together exceed the caches, as the layers of a model do. Knows no models.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from triton.runtime.errors import OutOfResources

from octavo.bench.tuned_shapes import Shape
from octavo.errors import ConfigError
from octavo.kernels.block_sizes import (
    ROW_BUCKETS,
    SHARED_BYTES,
    Blocks,
    Entries,
    Plan,
    as_entry,
    merged,
    plan_of,
    read_table,
    user_table_path,
    write_table,
)
from octavo.kernels.triton_linear import FASTEST, TritonWeight, multiply

DTYPE = torch.bfloat16  # fp16 moves as many bytes, and takes what is found for bf16
COLD_BYTES = 192 << 20  # several times the L2 cache of any GPU
MOST_CALLS, LEAST_CALLS = 32, 6
QUICK_ROUNDS, ROUNDS = 2, 7
FINALISTS = 5
GAIN = 0.99  # of torch's time: what differs less is left to torch
MOST_TILES = 1 << 16
SHOWN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Report = Callable[[str], None]

# (outputs, depth, warps, stages) of programs that use matrix instructions.
GEMM_BLOCKS = (
    *((64, 64, 4, stages) for stages in (4, 6, 8)),
    *((64, 128, 4, stages) for stages in (3, 4, 5)),
    *((64, 256, 4, stages) for stages in (2, 3, 4)),
    *((64, 256, 8, stages) for stages in (3, 4)),
    *((128, 64, 4, stages) for stages in (3, 4, 6)),
    *((128, 64, 8, stages) for stages in (3, 4, 6)),
    *((128, 128, 8, stages) for stages in (2, 3, 4)),
    (128, 128, 4, 3),
    *((256, 64, 8, stages) for stages in (3, 4)),
    (32, 128, 4, 4),
    (32, 256, 4, 3),
    (16, 256, 4, 4),
    # Long pieces of each row: kinder to the memory's pages.
    (16, 512, 4, 3),
    (16, 1024, 4, 2),
    (32, 512, 4, 2),
    (64, 512, 4, 2),
    (64, 512, 8, 2),
    (128, 256, 8, 2),
)


@dataclass(frozen=True)
class Found:
    """The best way for one shape and number of rows. Times are those of one call."""

    blocks: Blocks | None
    ours_us: float
    torch_us: float

    @property
    def us(self) -> float:
        return self.torch_us if self.blocks is None else self.ours_us


# (outputs, depth, warps) of programs that hold all their weights before the inputs are there.
HELD_BLOCKS = (
    (16, 512, 4),
    (16, 1024, 4),
    (32, 256, 4),
    (32, 512, 4),
    (64, 128, 4),
    (64, 256, 4),
    (64, 512, 8),
    (64, 1024, 8),
    (32, 1024, 8),
    (128, 128, 4),
    (128, 256, 8),
    (128, 512, 8),
)
LEAST_ROWS = 16  # of matrix instructions
MOST_HELD_ROWS, MOST_GEMV_ROWS = 128, 8


def gemv_candidates(depth: int, rows: int) -> list[Blocks]:
    """For few rows: 16 to 64 weights a thread."""
    found = []
    for tall in (1, 2, 4, 8):
        for wide in (512, 1024, 2048, 4096, 8192, 16_384):
            for warps in (1, 2, 4, 8, 16):
                a_thread = tall * wide // (32 * warps)
                if not 16 <= a_thread <= 64 or wide >= 2 * max(depth, 512):
                    continue
                if rows > 1 and (wide < depth or tall > 4):
                    continue
                found.append(Blocks("gemv", tall, wide, rows, warps=warps))
    return found


def held_candidates(shape: Shape, rows: int) -> list[Blocks]:
    """For small weights: all of it is read by programs that run at once."""
    outputs, depth = shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return [
        Blocks("held", tall, deep, max(16, rows), warps=warps)
        for tall, deep, warps in HELD_BLOCKS
        if rows <= MOST_HELD_ROWS
        and deep < 2 * depth
        and -(-outputs // tall) * -(-depth // deep) <= 4 * processors
    ]


def gemm_candidates(shape: Shape, rows: int) -> list[Blocks]:
    """For any number of rows, with one to four programs for each processor of the GPU."""
    outputs, depth = shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    found = held_candidates(shape, rows)
    for tall, deep, warps, stages in GEMM_BLOCKS:
        for wide in {max(16, rows), max(16, rows // 2 if rows > 64 else rows)}:
            stage_bytes = 2 * deep * (tall + wide)
            too_small = tall < 64 and rows > 32
            if stage_bytes * stages > SHARED_BYTES or tall * wide // warps > 4096 or too_small:
                continue
            tiles = -(-outputs // tall) * -(-rows // wide)
            parts = {max(1, programs * processors // tiles) for programs in (1, 2, 3, 4)} | {1}
            found += [
                Blocks("gemm", tall, deep, wide, splits, 1, warps, stages)
                for splits in sorted(parts)
                if splits == 1 or (splits <= 16 and depth // splits >= 2 * deep)
            ]
    return found


def candidates(shape: Shape, rows: int) -> list[Blocks]:
    """All that is worth a measurement, but for matrix instructions on fewer rows than they take.

    Those do the same work as for LEAST_ROWS, so what is best there stands in for them.
    """
    gemv = gemv_candidates(shape[1], rows) if rows <= MOST_GEMV_ROWS else []
    return gemv + (gemm_candidates(shape, rows) if rows >= LEAST_ROWS else [])


def compile_all(every: Sequence[Blocks]) -> int:
    """Fill Triton's cache on disk with the kernels of these blocks; return their number.

    A kernel's code depends on few of the sizes, and compiling is a second of one core each.
    """
    kinds = {replace(blocks, splits=min(blocks.splits, 2), prefetch=0): None for blocks in every}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(min(cpu_count() or 1, 16), mp_context=context) as pool:
        list(pool.map(_compile, kinds, chunksize=4))
    return len(kinds)


def _compile(blocks: Blocks) -> None:
    depths = [4 * blocks.depth]
    if blocks.kernel != "gemm":
        depths = [blocks.depth] + [2 * blocks.depth] * (blocks.rows == 1 or blocks.kernel == "held")
    for deep in depths:
        x = torch.zeros(blocks.rows, deep, dtype=DTYPE, device="cuda")
        weight = torch.zeros(max(16, blocks.outputs), deep, dtype=DTYPE, device="cuda")
        try_launch(x, prepare_for_any(weight), blocks)


def try_launch(x: Tensor, prepared: TritonWeight, blocks: Blocks) -> Tensor | None:
    """None where the GPU has too little of something for the blocks, or triton cannot make them."""
    try:
        return multiply(x, prepared, None, blocks)
    except (OutOfResources, RuntimeError):
        return None


def prepare_for_any(weight: Tensor) -> TritonWeight:
    """With counters for any blocks."""
    prepared = TritonWeight(weight, (None,) * len(ROW_BUCKETS), None)
    prepared.arrivals = torch.zeros(MOST_TILES, dtype=torch.int32, device=weight.device)
    return prepared


class GraphClock:
    """Times calls inside CUDA graphs, on a stream of its own."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._first = self._capture(lambda i: torch.zeros(1, device="cuda"), 1)  # holds the pool

    def us(self, call: Callable[[int], object], num_calls: int, rounds: int = ROUNDS) -> float:
        """The median, over rounds, of the mean time of call(0), call(1), ... in microseconds."""
        graph = self._capture(call, num_calls)
        make_event: Any = torch.cuda.Event
        events = [make_event(enable_timing=True) for _ in range(rounds + 1)]
        with torch.cuda.stream(self._stream):
            graph.replay()
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
        torch.cuda.synchronize()
        pairs = zip(events, events[1:], strict=False)
        times: list[float] = [before.elapsed_time(after) for before, after in pairs]
        return 1e3 * statistics.median(times) / num_calls

    def _capture(self, call: Callable[[int], object], num_calls: int) -> torch.cuda.CUDAGraph:
        """As `torch.cuda.graph` without its garbage collection, which outlasts a round."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            call(0)
            torch.cuda.synchronize()
            graph.capture_begin(pool=self._pool)
            for i in range(num_calls):
                call(i)
            graph.capture_end()
        return graph


class Tuner:
    """Measures the candidates of one shape after another."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._clock = GraphClock()

    def tune(self, shape: Shape) -> dict[int, Found]:
        """The best way for each of ROW_BUCKETS."""
        outputs, depth = shape
        count = -(-COLD_BYTES // (2 * outputs * depth))
        num_calls = max(LEAST_CALLS, min(MOST_CALLS, count))
        weights = [
            prepare_for_any(torch.randn(shape, dtype=DTYPE, device="cuda"))
            for _ in range(min(count, num_calls))
        ]
        inputs = torch.randn(ROW_BUCKETS[-1], depth, dtype=DTYPE, device="cuda")
        found: dict[int, Found] = {}
        finalists: list[Blocks] = []
        for rows in reversed(ROW_BUCKETS):
            tried = candidates(shape, rows) + (finalists if rows < LEAST_ROWS else [])
            found[rows], best = self._best(weights, inputs[:rows], num_calls, tried)
            finalists = best if rows == LEAST_ROWS else finalists
        return {rows: found[rows] for rows in ROW_BUCKETS}

    def _best(
        self,
        weights: Sequence[TritonWeight],
        x: Tensor,
        num_calls: int,
        tried: Sequence[Blocks],
    ) -> tuple[Found, list[Blocks]]:
        """The best of those tried, and those that came close."""

        def ours_us(blocks: Blocks, rounds: int) -> float:
            if try_launch(x, weights[0], blocks) is None:
                return float("inf")
            return self._clock.us(
                lambda i: multiply(x, weights[i % len(weights)], None, blocks), num_calls, rounds
            )

        torch_us = self._clock.us(
            lambda i: functional.linear(x, weights[i % len(weights)].plain), num_calls
        )
        quick = {blocks: ours_us(blocks, QUICK_ROUNDS) for blocks in tried}
        best = sorted(quick, key=lambda blocks: quick[blocks])[:FINALISTS]
        variants = dict.fromkeys(
            replace(blocks, prefetch=kib)
            for blocks in best
            for kib in ((0, 1, 2, 4) if blocks.kernel == "gemm" else (0,))
        )
        expected = functional.linear(x, weights[0].plain).float()
        measured = {
            blocks: ours_us(blocks, ROUNDS)
            for blocks in variants
            if is_close(multiply(x, weights[0], None, blocks), expected)
        }
        blocks = min(measured, key=lambda blocks: measured[blocks])
        won = measured[blocks] < GAIN * torch_us
        return Found(blocks if won else None, measured[blocks], torch_us), best


def is_close(ours: Tensor, expected: Tensor) -> bool:
    """Whether two results of one product differ by roundings alone."""
    error = (ours.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < 1e-2)


def tune(shapes: Sequence[Shape], report: Report) -> dict[str, Entries]:
    """The entries of a table for each shape, and a line to `report` for each measurement."""
    shapes = list(dict.fromkeys(shapes))
    every = [b for shape in shapes for rows in ROW_BUCKETS for b in candidates(shape, rows)]
    report(f"{len(every):,} candidates; compiling")
    report(f"{compile_all(every)} kernels compiled")
    tuner, entries = Tuner(), {}
    for outputs, depth in shapes:
        found = tuner.tune((outputs, depth))
        for rows, best in found.items():
            ratio = best.torch_us / best.us
            report(
                f"{outputs:>7} x {depth:<6} rows {rows:>3}: torch {best.torch_us:8.2f} us, "
                f"ours {best.ours_us:8.2f} us, x {ratio:.2f}  {as_entry(best.blocks) or 'torch'}"
            )
        entries[f"{outputs}x{depth}"] = {
            str(rows): as_entry(best.blocks) for rows, best in found.items()
        }
        torch.cuda.empty_cache()
    return entries


def step_table(shapes: Sequence[Shape], plans: dict[Shape, Plan]) -> list[tuple[int, float, float]]:
    """All products of one step, one after the other in a graph: (rows, torch ms, ours ms).

    Takes as much memory as the weights of the model do.

    Raises:
        ConfigError: they do not fit.
    """
    needed = sum(2 * outputs * depth for outputs, depth in shapes)
    if needed > 0.9 * torch.cuda.mem_get_info()[0]:
        raise ConfigError(f"the weights of a whole step take {needed / 1e9:.1f} GB")
    clock = GraphClock()
    weights = [
        TritonWeight(torch.randn(s, dtype=DTYPE, device="cuda"), plans[s], None) for s in shapes
    ]
    inputs = {
        k: torch.randn(SHOWN_ROWS[-1], k, dtype=DTYPE, device="cuda")
        for k in {weight.in_features for weight in weights}
    }
    found = []
    for rows in SHOWN_ROWS:

        def by_torch(i: int, rows: int = rows) -> Tensor:
            return functional.linear(inputs[weights[i].in_features][:rows], weights[i].plain)

        def by_us(i: int, rows: int = rows) -> Tensor:
            return FASTEST.apply(inputs[weights[i].in_features][:rows], weights[i], None)

        for i in range(len(weights)):  # compiled before a graph is captured
            by_us(i)
        in_ms = len(weights) / 1e3
        torch_ms, ours_ms = (clock.us(call, len(weights)) * in_ms for call in (by_torch, by_us))
        found.append((rows, torch_ms, ours_ms))
    return found


def tune_and_write(
    shapes: Sequence[Shape], output: Path | None, report: Report
) -> tuple[Path, dict[Shape, Plan]]:
    """Tune, add what was found to a table, and return where it is and the plans in it."""
    path = output or user_table_path()
    before = read_table(path)  # a broken one is told of before the work, not after
    device = torch.cuda.get_device_name()
    entries = tune(shapes, report)
    write_table(path, merged(before, {device: entries}))
    return path, {shape: plan_of(entries["{}x{}".format(*shape)]) for shape in shapes}
