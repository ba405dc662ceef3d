"""Times every Triton kernel against its torch reference, at shapes of Llama-3.1-8B and Qwen3-0.6B.

    python benchmarks/kernels_gpu.py [--filter attention]

A kernel's time is that of one of many calls in a CUDA graph, over copies of its inputs that
together exceed the caches; a reference's is that of an eager call, its launches included. The share
is of what the card itself shows first: the speed of a copy and of a large bf16 product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as functional
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.kernels import (
    PAGED_ATTENTION,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SAMPLE_TOKENS,
    SILU_MUL,
    AttentionBatch,
    Case,
    DrawOptions,
    Op,
)

BF16 = torch.bfloat16
COLD_BYTES = 256 << 20
CALLS, ROUNDS = 20, 7
HEAD_DIM, BLOCK_SIZE = 128, 16

Call = Callable[[int], object]  # called with 0, 1, 2, ...


@dataclass
class Row:
    op: str
    shape: str
    ours: Call
    reference: Call | None
    num_bytes: float = 0.0
    num_flops: float = 0.0


def median_us(run: Callable[[], object], calls: int) -> float:
    """The median time of one of the `calls` calls that a run makes, in microseconds."""
    times = []
    for _ in range(ROUNDS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        times.append(started.elapsed_time(ended) * 1e3 / calls)
    return median(times)


def graph_us(call: Call) -> float:
    torch.cuda.synchronize()  # another stream does not wait for the inputs
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    graph.replay()
    return median_us(graph.replay, CALLS)


def eager_us(call: Call) -> float:
    call(0)
    torch.cuda.synchronize()
    return median_us(lambda: call(1), 1)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(BF16)


def copies_of(make: Callable[[], Tensor], limit: int = CALLS) -> list[Tensor]:
    """So many equal tensors that one call's is cold when its turn comes again."""
    first = make()
    count = min(limit, -(-COLD_BYTES // (first.numel() * first.element_size())))
    return [first, *(make() for _ in range(count - 1))]


def chosen(op: Op, **sizes: int):
    choice = op.select(Case("cuda", BF16, sizes))
    if choice.name != "triton":
        raise SystemExit(str(choice))
    return choice.function


def elementwise_rows() -> Iterator[Row]:
    norm, gate = chosen(RMS_NORM), chosen(SILU_MUL)
    for tokens, hidden, inner in [(1, 4096, 14336), (64, 4096, 14336), (8192, 4096, 14336)] + [
        (64, 1024, 3072),
        (8192, 1024, 3072),
    ]:
        xs = copies_of(partial(normal, tokens, hidden), 8)
        residuals = copies_of(partial(normal, tokens, hidden), 8)
        weight = normal(hidden)

        def normed(op, i, xs=xs, residuals=residuals, weight=weight):
            return op(xs[i % len(xs)], weight, 1e-5, residuals[i % len(xs)])

        yield Row(
            "rms_norm + residual",
            f"{tokens}x{hidden}",
            partial(normed, norm),
            partial(normed, RMS_NORM.reference),
            tokens * hidden * 2 * 4,
        )
        wide = copies_of(partial(normal, tokens, 2 * inner), 8)

        def gated(op, i, wide=wide):
            return op(wide[i % len(wide)])

        yield Row(
            "silu_mul",
            f"{tokens}x{2 * inner}",
            partial(gated, gate),
            partial(gated, SILU_MUL.reference),
            tokens * inner * 2 * 3,
        )


def cache_rows() -> Iterator[Row]:
    case = {"head_dim": HEAD_DIM}
    for op, heads in ((ROTARY_KV_WRITE, 32), (QK_NORM_ROTARY_KV_WRITE, 16)):
        for tokens in (1, 64, 8192):
            sizes = [heads * HEAD_DIM, 8 * HEAD_DIM, 8 * HEAD_DIM]
            fused = copies_of(partial(normal, tokens, sum(sizes)), 8)
            shape = (2, -(-tokens // BLOCK_SIZE), 8, BLOCK_SIZE, HEAD_DIM)
            caches = [normal(*shape) for _ in fused]
            positions = torch.arange(tokens, device="cuda")
            slots = torch.randperm(shape[1] * BLOCK_SIZE, device="cuda")[:tokens]
            angles = torch.rand(tokens, HEAD_DIM, device="cuda")
            norms = (normal(HEAD_DIM), normal(HEAD_DIM), 1e-6)

            def write(
                run,
                i,
                sizes=sizes,
                given=(fused, caches, positions, angles, slots),
                norms=norms if op is QK_NORM_ROTARY_KV_WRITE else (),
            ):
                fused, caches, positions, angles, slots = given
                i %= len(fused)
                views = [part.unflatten(1, (-1, HEAD_DIM)) for part in fused[i].split(sizes, 1)]
                run(*views, positions, angles, caches[i], slots, *norms)

            yield Row(
                op.name,
                f"{tokens}x({heads}+8+8)x{HEAD_DIM}",
                partial(write, chosen(op, **case)),
                partial(write, op.reference),
                tokens * HEAD_DIM * 2 * (2 * heads + 3 * 8 + 2 * 8),  # kv twice, and the key back
            )


@dataclass(frozen=True)
class Bounds:
    """What a CUDA graph was captured for, where the batch is smaller."""

    num_sequences: int
    max_query_len: int
    max_context_len: int = 131_072


def batch_of(
    queries: list[int], contexts: list[int], bounds: Bounds | None = None
) -> tuple[AttentionBatch, int]:
    """A batch over randomly placed blocks, and the number of blocks."""
    bounds = bounds or Bounds(len(queries), max(queries), max(contexts))
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    tables = torch.zeros(
        bounds.num_sequences, -(-bounds.max_context_len // BLOCK_SIZE), dtype=torch.int32
    )
    for b, part in enumerate(torch.randperm(sum(blocks)).int().split(blocks)):
        tables[b, : len(part)] = part
    padding = [0] * (bounds.num_sequences - len(queries))
    starts = torch.tensor([0, *queries, *padding]).cumsum(0).int()
    lengths = torch.tensor([*contexts, *padding]).int()
    batch = AttentionBatch(
        starts.cuda(), lengths.cuda(), tables.cuda(), bounds.max_query_len, bounds.max_context_len
    )
    return batch, sum(blocks)


def attention_row(
    name: str,
    heads: int,
    kv_heads: int,
    queries: list[int],
    contexts: list[int],
    *,
    bounds: Bounds | None = None,
) -> Row:
    attention = chosen(PAGED_ATTENTION, head_dim=HEAD_DIM)
    batch, num_blocks = batch_of(queries, contexts, bounds)
    caches = copies_of(partial(normal, 2, num_blocks, kv_heads, BLOCK_SIZE, HEAD_DIM))
    query = normal(sum(queries), heads, HEAD_DIM)

    def attend(op, i):
        return op(query, caches[i % len(caches)], batch, HEAD_DIM**-0.5)

    seen = sum(n * c - n * (n - 1) / 2 for n, c in zip(queries, contexts, strict=True))
    is_decode = max(queries) == 1
    small = sum(queries) * max(contexts) * heads < 2**31  # the reference holds all scores
    return Row(
        name,
        f"{heads}/{kv_heads}",
        partial(attend, attention),
        partial(attend, PAGED_ATTENTION.reference) if small and not bounds else None,
        sum(contexts) * kv_heads * HEAD_DIM * 2 * 2 if is_decode else 0.0,
        0.0 if is_decode else 4 * seen * heads * HEAD_DIM,
    )


def decode_rows() -> Iterator[Row]:
    ragged = torch.randint(100, 2048, (128,)).tolist()
    for heads in (32, 16):
        for name, contexts in {
            "1 x 512": [512],
            "1 x 2000": [2000],
            "1 x 32768": [32768],
            "8 x 640": [640] * 8,
            "32 x 640": [640] * 32,
            "64 x 2000": [2000] * 64,
            "128 x 640": [640] * 128,
            "256 x 800": [800] * 256,
            "128 x 100..2047": ragged,
        }.items():
            yield attention_row(f"decode {name}", heads, 8, [1] * len(contexts), contexts)
        for contexts, num_sequences in ([512], 1), ([640] * 32, 32), ([800] * 40, 512):
            name = f"{len(contexts)} of {num_sequences} x {contexts[0]}, bounds"
            bounds = Bounds(num_sequences, 1)
            queries = [1] * len(contexts)
            yield attention_row(f"decode {name}", heads, 8, queries, contexts, bounds=bounds)


def prefill_rows() -> Iterator[Row]:
    for sequences, length in ((8, 8192), (64, 1024)):
        lengths = [length] * sequences
        row = attention_row(f"prefill {sequences} x {length}", 32, 8, lengths, lengths)
        yield row
        query, key, value = (normal(sequences, heads, length, HEAD_DIM) for heads in (32, 8, 8))
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

            def contiguous(i, backend=backend, given=(query, key, value)):
                with sdpa_kernel(backend):
                    return functional.scaled_dot_product_attention(
                        *given, is_causal=True, enable_gqa=True
                    )

            name = f"  torch {backend.name.removesuffix('_ATTENTION').lower()}, not paged"
            yield Row(name, row.shape, contiguous, None, 0.0, row.num_flops)
        del query, key, value
    yield attention_row("prefill 1024 after 7168", 32, 8, [1024] * 8, [8192] * 8)
    ragged = torch.randint(100, 1025, (64,)).tolist()
    yield attention_row("prefill 64 x 100..1024", 32, 8, ragged, ragged)
    mixed, contexts = [1] * 128 + [1024, 1024], [1000] * 128 + [1024, 1024]
    yield attention_row("128 decodes + 2 prefills", 32, 8, mixed, contexts)
    bounds = Bounds(512, sum(mixed))
    yield attention_row("the same, 512 by bounds", 32, 8, mixed, contexts, bounds=bounds)


def sampling_rows() -> Iterator[Row]:
    sample = chosen(SAMPLE_TOKENS)
    for rows in (1, 64, 256):
        logits = copies_of(lambda rows=rows: 3 * torch.randn(rows, 128_256, device="cuda"), 8)
        ones, zeros = torch.ones(rows, device="cuda"), torch.zeros(rows, device="cuda")
        counters = torch.arange(rows, device="cuda")
        for name, top_k, top_p in (("plain", 0, 1.0), ("top-p", 0, 0.9), ("top-k, top-p", 50, 0.9)):
            options = DrawOptions(
                temperature=ones * 0.6,
                top_k=(zeros + top_k).int(),
                top_p=ones * top_p,
                min_p=zeros,
                seeds=counters,
                positions=counters,
                truncates=name != "plain",
            )

            def draw(op, i, logits=logits, options=options):
                return op(logits[i % len(logits)], options)

            yield Row(
                f"sample_tokens {name}",
                f"{rows}x128256",
                partial(draw, sample),
                partial(draw, SAMPLE_TOKENS.reference),
                rows * 128_256 * 4,
            )


def ceilings() -> tuple[float, float]:
    """What this card does: bytes/s of a copy, and FLOP/s of a bf16 product."""
    source, target = (torch.randint(2**30, (2**28,), device="cuda").int() for _ in range(2))
    copied = 2 * source.numel() * 4 / eager_us(lambda i: target.copy_(source)) * 1e6
    a, b = normal(8192, 8192), normal(8192, 8192)
    return copied, 2 * 8192**3 / eager_us(lambda i: a @ b) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only groups whose name contains this")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"a copy {bandwidth / 1e9:.0f} GB/s, a bf16 product {rate / 1e12:.0f} TFLOP/s")
    print(
        f"{'op':28} {'shape':20} {'us':>9} {'GB/s':>6} {'TFLOP/s':>8} {'share':>6} {'torch us':>9}"
    )
    groups = {
        "elementwise": elementwise_rows,
        "rotary kv_write": cache_rows,
        "decode attention": decode_rows,
        "prefill attention": prefill_rows,
        "sampling": sampling_rows,
    }
    for name, rows in groups.items():
        if options.filter not in name:
            continue
        for row in rows():
            long = row.num_flops > 1e11
            ours = eager_us(row.ours) if long else graph_us(row.ours)
            theirs = f"{eager_us(row.reference):9.1f}" if row.reference else f"{'':9}"
            speed = row.num_bytes / ours * 1e6 / bandwidth + row.num_flops / ours * 1e6 / rate
            print(
                f"{row.op:28} {row.shape:20} {ours:9.1f} {row.num_bytes / ours / 1e3:6.0f}"
                f" {row.num_flops / ours / 1e6:8.0f} {speed:6.0%} {theirs}",
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
