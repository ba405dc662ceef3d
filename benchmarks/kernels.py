"""Times every CPU kernel against its torch reference, at the shapes of SmolLM2-135M by default.

    python benchmarks/kernels.py [--filter linear] [--seconds 0.2]

Prints the best of many calls, the launch from Python included. Weights rotate over copies that
together exceed the caches, as a model's layers do, so that one row is timed at memory speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels import (
    KV_WRITE,
    LINEAR,
    PAGED_ATTENTION,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SILU_MUL,
    AttentionBatch,
    Case,
    native,
)

BF16 = torch.bfloat16
COLD_BYTES = 128 << 20
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 576, 9, 3, 64, 1536, 49152
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


@dataclass
class Row:
    op: str
    shape: str
    native: Callable[[int], object]  # called with 0, 1, 2, ...
    reference: Callable[[int], object]
    num_bytes: float
    num_flops: float = 0.0


def best_us(function: Callable[[int], object], seconds: float) -> float:
    """The least time of one call in microseconds."""
    best, call, until = float("inf"), 0, time.perf_counter() + seconds
    while call < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        function(call)
        best = min(best, time.perf_counter() - started)
        call += 1
    return best * 1e6


def average_us(function: Callable[[int], object], seconds: float) -> float:
    """The least mean time of a call over rounds that together last `seconds`, in microseconds."""
    once = best_us(function, 0.02)
    calls = max(3, int(seconds / 8 / (once * 1e-6)))
    means = []
    for _ in range(8):
        started = time.perf_counter()
        for call in range(calls):
            function(call)
        means.append((time.perf_counter() - started) / calls)
    return min(means) * 1e6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def linear_rows() -> Iterator[Row]:
    shapes = {
        "qkv": (QKV, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate_up": (2 * INNER, HIDDEN),
        "down": (HIDDEN, INNER),
        "head": (VOCABULARY, HIDDEN),
    }
    for dtype in (BF16, torch.float32):
        linear = LINEAR.select(Case("cpu", dtype)).function
        for name, (outputs, width) in shapes.items():
            num_bytes = outputs * width * dtype.itemsize
            copies = max(1, COLD_BYTES // num_bytes)
            weights = [torch.randn(outputs, width).to(dtype) for _ in range(copies)]
            packed = [linear.prepare(weight) for weight in weights]
            for rows in (1, 4, 32, 64) if name == "head" else (1, 4, 32, 64, 1024):
                x = torch.randn(rows, width).to(dtype)
                yield Row(
                    f"linear {name} {'bf16' if dtype is BF16 else 'fp32'}",
                    f"{rows}x{width} -> {outputs}",
                    lambda i, x=x, packed=packed, linear=linear: linear.apply(
                        x, packed[i % len(packed)], None
                    ),
                    lambda i, x=x, weights=weights: torch.nn.functional.linear(
                        x, weights[i % len(weights)]
                    ),
                    num_bytes,
                    2 * rows * outputs * width,
                )


def elementwise_rows() -> Iterator[Row]:
    norm = RMS_NORM.select(Case("cpu", BF16)).function
    gate = SILU_MUL.select(Case("cpu", BF16)).function
    for rows in (1, 32, 1024):
        x, residual, weight = normal(rows, HIDDEN), normal(rows, HIDDEN), normal(HIDDEN)
        yield Row(
            "rms_norm + residual",
            f"{rows}x{HIDDEN}",
            lambda i, x=x, r=residual, w=weight: norm(x, w, 1e-5, r),
            lambda i, x=x, r=residual, w=weight: RMS_NORM.reference(x, w, 1e-5, r),
            rows * HIDDEN * 2 * 4,
        )
        wide = normal(rows, 2 * INNER)
        yield Row(
            "silu_mul",
            f"{rows}x{2 * INNER}",
            lambda i, x=wide: gate(x),
            lambda i, x=wide: SILU_MUL.reference(x),
            rows * INNER * 2 * 3,
        )


def cache_rows() -> Iterator[Row]:
    case = Case("cpu", BF16, {"head_dim": HEAD_DIM})
    kv_cache = torch.zeros(2, 128, KV_HEADS, 16, HEAD_DIM, dtype=BF16)
    angles = torch.randn(2048, HEAD_DIM)
    for rows in (1, 32, 1024):
        qkv = normal(rows, QKV)
        query, key, value = (
            part.view(rows, -1, HEAD_DIM)
            for part in qkv.split(
                [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=1
            )
        )
        positions = torch.arange(rows)
        arguments = {
            KV_WRITE: (key, value, kv_cache, positions),
            ROTARY_KV_WRITE: (query, key, value, positions, angles, kv_cache, positions),
        }
        for op, given in arguments.items():
            chosen = op.select(case).function
            yield Row(
                op.name,
                f"{rows}x{QKV}",
                lambda i, f=chosen, given=given: f(*given),
                lambda i, f=op.reference, given=given: f(*given),
                rows * QKV * 2 * 2,
            )


def attention_rows() -> Iterator[Row]:
    case = Case("cpu", BF16, {"head_dim": HEAD_DIM})
    attention = PAGED_ATTENTION.select(case).function
    steps = [  # (sequences, queries of each, context of each)
        (1, 1, 256),
        (1, 1, 2048),
        (32, 1, 250),
        (1, 128, 128),
        (1, 1024, 1024),
        (1, 256, 2048),
    ]
    for sequences, queries, context in steps:
        blocks = -(-context // 16)
        caches = max(1, COLD_BYTES // (sequences * blocks * 16 * KV_HEADS * HEAD_DIM * 4))
        caches = min(caches, 30)
        kv_caches = [normal(2, sequences * blocks, KV_HEADS, 16, HEAD_DIM) for _ in range(caches)]
        batch = AttentionBatch(
            torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32),
            torch.full((sequences,), context, dtype=torch.int32),
            torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks),
            queries,
            context,
        )
        query = normal(sequences * queries, HEADS, HEAD_DIM)
        seen = sum(context - queries + i + 1 for i in range(queries))
        yield Row(
            "paged_attention",
            f"{sequences} x {queries} over {context}",
            lambda i, q=query, kv=kv_caches, b=batch: attention(q, kv[i % len(kv)], b, 0.125),
            lambda i, q=query, kv=kv_caches, b=batch: PAGED_ATTENTION.reference(
                q, kv[i % len(kv)], b, 0.125
            ),
            sequences * context * KV_HEADS * HEAD_DIM * 4,
            4 * sequences * seen * HEADS * HEAD_DIM,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each cell")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {native.features()}")
    print(
        f"{'op':20} {'shape':22} {'native us':>10} {'torch us':>10} {'ratio':>6}"
        f" {'GB/s':>6} {'GFLOP/s':>8}"
    )
    groups = {
        "linear": linear_rows,
        "rms_norm silu_mul": elementwise_rows,
        "rotary kv_write": cache_rows,
        "paged_attention": attention_rows,
    }
    for names, rows in groups.items():
        if options.filter and options.filter not in names:
            continue
        for row in rows():
            ours = average_us(row.native, options.seconds)
            theirs = average_us(row.reference, options.seconds)
            print(
                f"{row.op:20} {row.shape:22} {ours:10.1f} {theirs:10.1f} {theirs / ours:6.1f}"
                f" {row.num_bytes / ours / 1e3:6.1f} {row.num_flops / ours / 1e3:8.0f}"
            )


if __name__ == "__main__":
    main()
