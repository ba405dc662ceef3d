"""Sampling in Triton without a sort: truncation searches for an edge, the draw for a sum.

Owns how a row of the vocabulary is cut into chunks. Every sum has a fixed order, so a row's token
is the same in any batch. Does not know requests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.sample_tokens import DrawOptions
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

CHUNK = 4096
SEARCHED_AT_ONCE = 8192


def triton_sample_tokens(logits: Tensor, options: DrawOptions) -> tuple[Tensor, Tensor]:
    """As SampleTokens. Works from the chunks' tops and sums, and reads a row two or three times.

    Logits may be bf16, fp16 or fp32: every load of one is converted to fp32. Where some row
    truncates, one program a row also halves the range of its logits until it has the edge: the
    least logit that is kept.
    """
    rows, vocabulary = logits.shape
    row_stride, dense = logits.stride()
    if dense != 1 or options.seeds.shape != (rows,) or vocabulary == 0:
        rule = "logits are [S, V] with dense rows, options are columns [S]"
        raise refuse("sample_tokens", rule, logits=logits, seeds=options.seeds)
    token_ids = logits.new_empty(rows, dtype=torch.int64)
    is_finite = logits.new_empty(rows, dtype=torch.bool)
    if rows == 0:
        return token_ids, is_finite
    num_chunks, summarise, search, draw = _constants(vocabulary, CHUNK, SEARCHED_AT_ONCE)
    tops = logits.new_empty(rows, num_chunks, dtype=torch.float32)
    sums = logits.new_empty(rows, num_chunks, dtype=torch.float64)
    likeliest = logits.new_empty(rows, num_chunks, dtype=torch.int32)
    edges = logits.new_empty(rows, dtype=torch.float32)
    read = (logits, row_stride, options.temperature)
    chunked = (tops, sums, likeliest)
    truncates = options.truncates
    if truncates:
        limits = (options.top_k, options.top_p, options.min_p)
        launch(_summarise, (rows, num_chunks))(*read, edges, *chunked, EDGES=False, **summarise)
        launch(_find_edges, (rows,))(*read, *limits, tops, edges, **search)
    launch(_summarise, (rows, num_chunks))(*read, edges, *chunked, EDGES=truncates, **summarise)
    counters = (options.seeds, options.positions)
    written = (token_ids, is_finite)
    launch(_draw, (rows,))(*read, *counters, edges, *chunked, *written, EDGES=truncates, **draw)
    return token_ids, is_finite


@cache
def _constants(
    vocabulary: int, chunk: int, searched_at_once: int
) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(chunks of a row, keywords of _summarise, of _find_edges, of _draw)"""
    num_chunks = triton.cdiv(vocabulary, chunk)
    common = {"VOCABULARY": vocabulary, **launch_options()}
    padded = {"NUM_CHUNKS": num_chunks, "CHUNKS_PAD": triton.next_power_of_2(num_chunks)}
    at_once = min(searched_at_once, triton.next_power_of_2(vocabulary))
    return (
        num_chunks,
        {**common, "CHUNK": chunk, "num_warps": 8},
        {**common, **padded, "AT_ONCE": at_once, "num_warps": 16},
        {**common, **padded, "CHUNK": chunk, "num_warps": 8},
    )


@triton.jit
def _scaled(logits, row, row_stride, temperature, column, there):
    """Logits over the temperature; -inf beyond the vocabulary. Greedy rows are left as they are."""
    divisor = tl.load(temperature + row)
    divisor = tl.where(divisor > 0.0, divisor, 1.0)
    raw = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=there, other=float("-inf"))
    return raw.to(tl.float32) / divisor


@triton.jit(do_not_specialize_on_alignment=["temperature"])
def _summarise(
    logits,
    row_stride,
    temperature,
    edges,
    tops,
    sums,
    likeliest,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A chunk's top (NaN if it holds one), where it is, and its sum of exp(logit - top)."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    scaled = _scaled(logits, row, row_stride, temperature, column, column < VOCABULARY)
    broken = tl.max((scaled != scaled).to(tl.int32), 0) > 0
    top = tl.max(tl.where(scaled != scaled, float("-inf"), scaled), 0)
    first = tl.min(tl.where(scaled == top, column, VOCABULARY - 1), 0)
    kept = scaled > float("-inf")
    if EDGES:
        kept = kept & (scaled >= tl.load(edges + row))
    weights = tl.where(kept, tl.exp(scaled - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    place = row.to(tl.int64) * tl.num_programs(1) + chunk
    tl.store(tops + place, tl.where(broken, float("nan"), top))
    tl.store(sums + place, tl.sum(weights.to(tl.float64), 0))
    tl.store(likeliest + place, first)


@triton.jit
def _row_top(tops, row, NUM_CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """The top of each chunk and of the row, and whether that is a number."""
    chunk = tl.arange(0, CHUNKS_PAD)
    own = tl.load(
        tops + row.to(tl.int64) * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=float("-inf")
    )
    top = tl.max(tl.where(own != own, float("-inf"), own), 0)
    broken = tl.max((own != own).to(tl.int32), 0) > 0
    finite = (top > float("-inf")) & (top < float("inf")) & (broken == 0)
    return own, top, finite


@triton.jit
def _at_or_above(
    logits,
    row,
    row_stride,
    temperature,
    middle,
    top,
    VOCABULARY: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """Of a row's logits at `middle` or above: how many (or their weight), and the least.

    Also the greatest of those below.
    """
    total = tl.zeros([AT_ONCE], tl.float32)
    least = tl.full([AT_ONCE], float("inf"), tl.float32)
    greatest = tl.full([AT_ONCE], float("-inf"), tl.float32)
    for first in tl.range(0, VOCABULARY, AT_ONCE):
        column = first + tl.arange(0, AT_ONCE)
        scaled = _scaled(logits, row, row_stride, temperature, column, column < VOCABULARY)
        above = scaled >= middle
        weights = tl.exp(scaled - top) if WEIGHED else 1.0
        total += tl.where(above, weights, 0.0)
        least = tl.minimum(least, tl.where(above, scaled, float("inf")))
        greatest = tl.maximum(greatest, tl.where(above, float("-inf"), scaled))
    # A count stays exact: each lane's is small, and the sum is of whole numbers below 2^24.
    return tl.sum(total, 0), tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _edge(
    logits,
    row,
    row_stride,
    temperature,
    lower,
    top,
    needed,
    VOCABULARY: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """The greatest logit such that it and all above it make up `needed`; at least `lower`.

    Both ends are logits of the row, and each round moves one of them to another logit.
    """
    upper = top
    while lower < upper:
        middle = lower + (upper - lower) * 0.5
        middle = tl.where(middle > lower, middle, upper)  # neighbours among the floats
        total, least, greatest = _at_or_above(
            logits, row, row_stride, temperature, middle, top, VOCABULARY, AT_ONCE, WEIGHED
        )
        enough = total >= needed
        lower = tl.where(enough, least, lower)
        upper = tl.where(enough, upper, greatest)
    return lower


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p"])
def _find_edges(
    logits,
    row_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    tops,
    edges,
    VOCABULARY: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The least logit that a row keeps: top-k, then top-p of what that keeps, then min-p."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    _, top, finite = _row_top(tops, row, NUM_CHUNKS, CHUNKS_PAD)
    edge = float("-inf")
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    if finite & (tl.load(temperature + row) > 0.0) & ((k > 0) | (p < 1.0)):
        lowest = -3.0e38  # below it only banned tokens
        total, lowest_kept, below = _at_or_above(
            logits, row, row_stride, temperature, lowest, top, VOCABULARY, AT_ONCE, True
        )
        edge = lowest_kept
        if k > 0:
            edge = _edge(
                logits,
                row,
                row_stride,
                temperature,
                edge,
                top,
                k.to(tl.float32),
                VOCABULARY,
                AT_ONCE,
                False,
            )
            total, lowest_kept, below = _at_or_above(
                logits, row, row_stride, temperature, edge, top, VOCABULARY, AT_ONCE, True
            )
        if p < 1.0:
            edge = _edge(
                logits,
                row,
                row_stride,
                temperature,
                edge,
                top,
                p * total,
                VOCABULARY,
                AT_ONCE,
                True,
            )
    tl.store(edges + row, tl.maximum(edge, top + tl.log(tl.load(min_p + row))))


@triton.jit
def _uniform(seed, position):
    """As `sampling.philox_uniform`."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = (first.to(tl.uint64) << 21) | (second.to(tl.uint64) >> 11)
    return bits.to(tl.float64) * (2.0**-53)


@triton.jit(do_not_specialize_on_alignment=["temperature", "seeds", "positions"])
def _draw(
    logits,
    row_stride,
    temperature,
    seeds,
    positions,
    edges,
    tops,
    sums,
    likeliest,
    token_ids,
    is_finite,
    VOCABULARY: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Finds the chunk that holds the row's uniform number, then the token in it."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    own_tops, top, finite = _row_top(tops, row, NUM_CHUNKS, CHUNKS_PAD)
    tl.store(is_finite + row, finite)
    index = tl.arange(0, CHUNKS_PAD)
    place = row.to(tl.int64) * NUM_CHUNKS + index
    if (tl.load(temperature + row) == 0.0) | (finite == 0):
        chunk = tl.min(tl.where((own_tops == top) & (index < NUM_CHUNKS), index, NUM_CHUNKS - 1), 0)
        tl.store(token_ids + row, tl.load(likeliest + row * NUM_CHUNKS + chunk).to(tl.int64))
        return
    masses = tl.load(sums + place, mask=index < NUM_CHUNKS, other=0.0)
    masses = tl.where(masses > 0.0, masses * tl.exp((own_tops - top).to(tl.float64)), 0.0)
    reached = tl.cumsum(masses, 0)
    target = _uniform(tl.load(seeds + row), tl.load(positions + row)) * tl.max(reached, 0)
    # Rounding must not lead to a chunk, or to a token, of no weight.
    last = tl.max(tl.where(masses > 0.0, index, 0), 0)
    chunk = tl.minimum(tl.sum((reached <= target).to(tl.int32), 0), last)
    target -= tl.sum(tl.where(index < chunk, masses, 0.0), 0)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    scaled = _scaled(logits, row, row_stride, temperature, column, column < VOCABULARY)
    kept = scaled > float("-inf")
    if EDGES:
        kept = kept & (scaled >= tl.load(edges + row))
    weights = tl.where(kept, tl.exp(scaled - top), 0.0).to(tl.float64)
    within = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    last_token = tl.max(tl.where(weights > 0.0, column, chunk * CHUNK), 0)
    token = tl.minimum(chunk * CHUNK + within, last_token)
    tl.store(token_ids + row, token.to(tl.int64))
