"""How the decode attention cuts what it walks of a context, and adds up what comes of the parts.

Lengths of splits, chunks and tiles are powers of two, and named by their logarithms. They follow
from the length of what is walked alone. Does not know how a part is made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton_attention_tile import store_rows

ALL, SPLIT, CHUNK, TILE = (tl.constexpr(grain) for grain in range(4))  # what one program does
DOUBLINGS = tl.constexpr(12)  # of a split's length: 67 million tokens
TOPS_AT_ONCE = tl.constexpr(64)
# Where nothing was seen. Not -inf, for -inf - -inf is no number.
NO_TOP = tl.constexpr(-1e30)


@triton.jit
def own_split_log(context_len, SPLIT_LOG: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """How a context is split: a matter of its own length, so that its batch changes no bit."""
    log = context_len * 0 + SPLIT_LOG
    for i in tl.static_range(DOUBLINGS):
        log += (context_len > (MAX_SPLITS << (SPLIT_LOG + i))).to(tl.int32)
    return log


@triton.jit
def log_of_unit(
    split_log, grain, KEYS_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, SPLIT_LOG: tl.constexpr
):
    """Context tokens of a unit, as a power of two. A long context has no units of one tile."""
    fine = (grain == TILE) & (split_log == SPLIT_LOG)
    log = tl.where(fine, KEYS_LOG, split_log - (SPLIT_LOG - CHUNK_LOG))
    return tl.where(grain == ALL, 30, tl.where(grain == SPLIT, split_log, log))


@triton.jit
def first_walked(context_len, num_queries, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The tile in which the window of a sequence's first query begins."""
    return tl.maximum(context_len - num_queries + 1 - WINDOW, 0) // KEYS * KEYS


@triton.jit
def num_units(context_len, unit_log):
    """At least one: a query over an empty context needs its zeros."""
    return tl.maximum(((context_len - 1) >> unit_log) + 1, 1)


@triton.jit
def combine(
    out,
    parts,
    tops,
    sums,
    first_part,
    num_parts,
    unit_log,
    chunk_mask,
    split_mask,
    first_query,
    num_rows,
    first_row,
    max_rows,
    kv_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One query's rows of a (sequence, kv head): adds up its parts, which are KV_HEADS apart.

    Tops and sums are loaded as wide as the parts, and all of them with rows fastest: so the three
    have one layout, and no addition waits for threads to trade what they hold.
    """
    row = first_row + tl.arange(0, GROUP_PAD)
    column = tl.arange(0, DIM_PAD)
    exists = (tl.arange(0, GROUP_PAD) < GROUP) & (row < num_rows)
    there = exists[:, None] & (column < DIM)[None, :]
    # What other multiprocessors wrote is loaded past the first-level cache, here and below.
    row_top = tl.full([GROUP_PAD], NO_TOP, tl.float32)
    for first in tl.range(0, num_parts, TOPS_AT_ONCE):
        index = first + tl.arange(0, TOPS_AT_ONCE)
        line = (first_part + index * KV_HEADS)[None, :].to(tl.int64) * max_rows + row[:, None]
        inside = exists[:, None] & (index < num_parts)[None, :]
        some = tl.load(tops + line, inside, NO_TOP, cache_modifier=".cg")
        row_top = tl.maximum(row_top, tl.max(some, 1))
    nothing = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    top = row_top[:, None] + nothing
    chunk, chunk_sum = nothing, nothing
    split, split_sum = nothing, nothing
    acc, total = nothing, nothing
    for first in tl.range(0, num_parts, AT_ONCE):
        loaded = ()  # first all loads, then what branches: so they are on their way at once
        for i in tl.static_range(AT_ONCE):
            slot = (first_part + (first + i) * KV_HEADS).to(tl.int64) * max_rows
            inside = there & (first + i < num_parts)
            place = row[:, None] + column[None, :] * max_rows
            line = slot + row[:, None] + column[None, :] * 0
            part = tl.load(parts + slot * DIM + place, inside, 0.0, cache_modifier=".cg")
            part_top = tl.load(tops + line, inside, NO_TOP, cache_modifier=".cg")
            part_sum = tl.load(sums + line, inside, 0.0, cache_modifier=".cg")
            loaded = loaded + (part, part_top, part_sum)  # type: ignore[assignment]
        for i in tl.static_range(AT_ONCE):
            start = (first + i) << unit_log
            if (start & chunk_mask) == 0:
                split, split_sum = split + chunk, split_sum + chunk_sum
                chunk, chunk_sum = nothing, nothing
                if (start & split_mask) == 0:
                    acc, total = acc + split, total + split_sum
                    split, split_sum = nothing, nothing
            share = tl.exp2(loaded[3 * i + 1] - top)
            chunk = tl.fma(loaded[3 * i], share, chunk)
            chunk_sum = tl.fma(loaded[3 * i + 2], share, chunk_sum)
    acc, total = acc + (split + chunk), total + (split_sum + chunk_sum)
    last = tl.where(exists, row, num_rows)
    store_rows(out, acc, total, first_query, num_rows, last, kv_head, KV_HEADS, GROUP, DIM, DIM_PAD)
