"""Attention of few queries (a decode, a short draft) over the paged KV cache, in Triton.

Bound by the read of the cache, so a context is cut among programs ("Flash-Decoding") and whichever
program finishes last puts the parts together. A fixed number of programs find their work in the
lengths on the device: nothing is compiled or launched for how long or how many they are, so one
CUDA graph serves every smaller batch. Does not know requests, nor how blocks were allocated.

What is summed in which order depends on a context's own length only: tiles are added up from the
left to chunks, chunks to splits, splits to the result. Which of these a program does on its own
(the grain) depends on how much there is to do; it changes who adds, never what is added to what.
And as weights are relative to powers of two, to change what they are relative to rounds nothing.
So a token has the same bits whatever is beside it, and however many multiprocessors there are.

Of a context with a window only the span that the sequence's queries see is walked. It begins at a
whole tile, and all that was said of a context's length holds of the span's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.paged_attention import PLAIN, AttentionBatch, AttentionKind
from octavo.kernels.triton_attention_parts import (
    ALL,
    CHUNK,
    NO_TOP,
    SPLIT,
    TILE,
    combine,
    first_walked,
    log_of_unit,
    num_units,
    own_split_log,
)
from octavo.kernels.triton_attention_tile import (
    capped,
    counted_at_once,
    kind_constants,
    load_keys_and_values,
    load_lengths,
    load_queries,
    multiprocessors,
    owner_of,
    store_rows,
)
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs

ROWS = 16  # of a tile: the fewest that the matrix units take
MAX_ROWS = 32  # for large groups; more sums would not fit the registers
SPLIT_LEN = 1024  # context tokens of a split, doubled until MAX_SPLITS cover the context
MAX_SPLITS = 32
CHUNKS = 4  # of a split
PROGRAMS_PER_MULTIPROCESSOR = 2
REGISTERS = 1 << 16  # of a multiprocessor
ENOUGH_PER_MULTIPROCESSOR = 0.75  # splits (or chunks) to do: with fewer, a finer grain is better
PLENTY_PER_MULTIPROCESSOR = 3.5  # whole contexts of about one length, likewise
PARTS_AT_ONCE = 4
PART_BYTES = 32 << 20  # of all parts; contexts that would need more are not cut
NUM_ARRIVALS = 1 << 16
FIRST_ARRIVAL = tl.constexpr(32)  # those before it share a cache line with the ticket
LOG2_E = 1.4426950408889634
# What changes from step to step must not be compiled in: a step would wait for the compiler.
STEP_TENSORS = ["query_starts", "context_lens", "block_tables"]
PART_TENSORS = ["parts", "tops", "sums"]  # aligned or not by the number of rows
STEP_NUMBERS = ["num_tokens", "num_sequences", "table_width"]
OWN_NUMBERS = ["max_rows", "capacity", "enough", "plenty"]

# (bytes of an element, padded head size) -> keys of a tile, warps, stages for a small batch and a
# large one. Keys and warps change bits, stages do not: more of them are a longer way to the first
# load and a faster loop after it.
TILES = {
    (2, 64): (64, 8, 3, 5),
    (2, 128): (64, 8, 3, 5),
    (2, 256): (32, 4, 3, 3),
    (4, 64): (32, 4, 2, 2),
    (4, 128): (32, 4, 2, 2),
    (4, 256): (16, 4, 2, 2),
}
SMALL_BATCH = 32
_arrivals_of: dict[torch.device, Tensor] = {}


def most_queries(group: int) -> int:
    """A sequence with no more queries in a step than this is attended to here."""
    return max(1, ROWS // group)


def attend_with_few_queries(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    batch: AttentionBatch,
    scale: float,
    kind: AttentionKind = PLAIN,
) -> None:
    """Writes the rows of `out` [T, Hq, D] of the sequences with 1 to `most_queries` queries.

    Also zeros those of tokens beyond query_starts[B], which are padding. Arguments otherwise as
    PagedAttention; `max_query_len` is only a bound, and nothing else about lengths is asked for.
    """
    num_tokens, num_heads, dim = query.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = batch.block_tables.shape
    group = num_heads // num_kv_heads
    rows = min(MAX_ROWS, max(ROWS, triton.next_power_of_2(group)))
    row_tiles = triton.cdiv(group, rows) if group > rows else 1
    dim_pad = max(16, triton.next_power_of_2(dim))
    keys, warps, *stages = TILES[query.element_size(), max(64, dim_pad)]
    count = multiprocessors(query)
    enough = int(count * ENOUGH_PER_MULTIPROCESSOR)
    max_rows = group * min(max(1, batch.max_query_len), most_queries(group))
    most_parts = num_sequences * num_kv_heads * MAX_SPLITS
    capacity = min(most_parts, PART_BYTES // (max_rows * (dim + 2) * 4))
    # A finer grain than splits is taken only if there are fewer than `enough` of a coarser one.
    capacity = max(capacity, enough * max(CHUNKS, SPLIT_LEN // CHUNKS // keys))
    # Rows fastest, see `combine`.
    parts = query.new_empty((capacity, dim, max_rows), dtype=torch.float32)
    tops, sums = query.new_empty((2, capacity, max_rows), dtype=torch.float32)
    launch(_attend, (count * PROGRAMS_PER_MULTIPROCESSOR,))(
        *(query, kv_cache, out, batch.query_starts, batch.context_lens, batch.block_tables),
        *(parts, tops, sums, _arrivals(query, num_sequences * num_kv_heads * row_tiles)),
        *(num_tokens, num_sequences, table_width, max_rows, capacity, enough),
        int(count * PLENTY_PER_MULTIPROCESSOR),
        num_blocks * num_kv_heads * block_size * dim,
        *(query.stride(0), query.stride(1), (kind.softcap or scale) * LOG2_E),
        BATCH_PAD=counted_at_once(num_sequences),
        ROWS=rows,
        ROW_TILES=row_tiles,
        MAX_QUERIES=most_queries(group),
        KEYS_LOG=keys.bit_length() - 1,
        CHUNK_LOG=(SPLIT_LEN // CHUNKS).bit_length() - 1,
        SPLIT_LOG=SPLIT_LEN.bit_length() - 1,
        MAX_SPLITS=MAX_SPLITS,
        AT_ONCE=PARTS_AT_ONCE,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(min(group, rows)),
        BLOCK_SIZE=block_size,
        DIM=dim,
        DIM_PAD=dim_pad,
        # Triton would round fp32 operands to tf32 otherwise.
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        **launch_options(),
        **kind_constants(kind, scale),
        num_warps=warps,
        num_stages=stages[num_sequences > SMALL_BATCH],
        maxnreg=min(255, REGISTERS // (PROGRAMS_PER_MULTIPROCESSOR * 32 * warps) // 8 * 8),
    )


def _arrivals(query: Tensor, count: int) -> Tensor:
    """Zeros that every launch leaves as zeros, for one stream at a time on a device.

    Made outside of CUDA graphs. A graph that needs them before any plain call makes its own, and so
    does a batch that is larger than these: both are set to zero at each use.
    """
    size = int(FIRST_ARRIVAL) + count
    if size <= NUM_ARRIVALS and query.device in _arrivals_of:
        return _arrivals_of[query.device]
    held = torch.zeros(max(NUM_ARRIVALS, size), dtype=torch.int32, device=query.device)
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    if size <= NUM_ARRIVALS and not capturing:
        _arrivals_of[query.device] = held
    return held


@triton.jit
def _attend_to_tile(
    queries,
    last_visible,
    start,
    stop,
    cache,
    value_offset,
    table,
    kv_head,
    scale_log2,
    KEYS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP_SCALE: tl.constexpr,
):
    """Of one tile of keys: [ROWS, DIM_PAD] weighted sums, [ROWS, 1] top scores and weights.

    The top is rounded up, so that the weights of two tiles differ by an exact power of two.
    """
    position = start + tl.arange(0, KEYS)
    exists = position < stop
    if WINDOW:
        exists &= position > tl.min(last_visible, 0) - WINDOW  # blocks before may be anybody's
    keys, values = load_keys_and_values(
        position,
        exists,
        cache,
        value_offset,
        table,
        kv_head,
        KV_HEADS,
        BLOCK_SIZE,
        DIM,
        DIM_PAD,
        True,
    )
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [ROWS, KEYS]
    if CAP_SCALE != 0.0:
        scores = capped(scores, CAP_SCALE)
    seen = (position[None, :] <= last_visible[:, None]) & exists[None, :]
    if WINDOW:
        seen &= position[None, :] > (last_visible - WINDOW)[:, None]
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(tl.ceil(tl.max(scores, 1)[:, None] * scale_log2), NO_TOP)
    weights = tl.exp2(tl.fma(scores, scale_log2, -top))
    acc = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return acc, top, tl.sum(weights, 1)[:, None]


@triton.jit(
    do_not_specialize=STEP_NUMBERS + OWN_NUMBERS,
    do_not_specialize_on_alignment=STEP_TENSORS + PART_TENSORS,
)
def _attend(
    query,
    kv_cache,
    out,
    query_starts,
    context_lens,
    block_tables,
    parts,
    tops,
    sums,
    arrivals,
    num_tokens,
    num_sequences,
    table_width,
    max_rows,
    capacity,
    enough,
    plenty,
    value_offset,
    token_stride,
    head_stride,
    scale_log2,
    BATCH_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    KEYS_LOG: tl.constexpr,
    CHUNK_LOG: tl.constexpr,
    SPLIT_LOG: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    WINDOW: tl.constexpr = 0,
    CAP_SCALE: tl.constexpr = 0.0,
    CAUSAL: tl.constexpr = True,
):
    """Items (sequence, unit of its context, kv head, tile of rows), heads fastest, in turn."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    KEYS: tl.constexpr = 1 << KEYS_LOG
    HEADS: tl.constexpr = KV_HEADS * ROW_TILES
    num_programs = tl.num_programs(0)
    num_queries, contexts = load_lengths(query_starts, context_lens, num_sequences, BATCH_PAD)
    if WINDOW:
        contexts -= first_walked(contexts, num_queries, KEYS, WINDOW)
    num_owned = tl.load(query_starts + num_sequences)
    ours = ((num_queries > 0) & (num_queries <= MAX_QUERIES)).to(tl.int32)
    split_logs = own_split_log(contexts, SPLIT_LOG, MAX_SPLITS)
    num_splits = num_units(contexts, split_logs) * ours
    num_chunks = num_units(contexts, split_logs - (SPLIT_LOG - CHUNK_LOG)) * ours
    # Both sums in one reduction: it is the longest part of what there is before the first load.
    both = tl.sum(num_splits.to(tl.int64) + (num_chunks.to(tl.int64) << 32), 0)
    splits = (both & 0xFFFFFFFF).to(tl.int32) * HEADS
    chunks = (both >> 32).to(tl.int32) * HEADS
    grain = tl.where(chunks >= enough, CHUNK, TILE)
    grain = tl.where(splits >= enough, SPLIT, grain)
    if splits >= plenty:
        # Contexts of about one length even out by themselves.
        owners = tl.sum(ours, 0)
        mean = tl.sum(contexts * ours, 0) // owners
        is_even = tl.max(contexts * ours, 0) * 4 <= mean * 5
        grain = tl.where(is_even & (owners * HEADS >= plenty), ALL, grain)
    grain = tl.where(splits > capacity, ALL, grain)
    units = num_units(contexts, log_of_unit(split_logs, grain, KEYS_LOG, CHUNK_LOG, SPLIT_LOG))
    units *= ours
    ends = tl.cumsum(units, 0)
    num_items = tl.max(ends, 0) * HEADS
    item = tl.program_id(0)
    while item < num_items:
        kv_head = item % HEADS // ROW_TILES
        first_row = item % ROW_TILES * ROWS
        b, first_unit = owner_of(item // HEADS, units, ends)
        unit = item // HEADS - first_unit
        first_query = tl.load(query_starts + b)
        num_rows = (tl.load(query_starts + b + 1) - first_query) * GROUP
        context_len = tl.load(context_lens + b)
        base = 0
        if WINDOW:
            base = first_walked(context_len, num_rows // GROUP, KEYS, WINDOW)
        span = context_len - base
        split_log = own_split_log(span, SPLIT_LOG, MAX_SPLITS)
        unit_log = log_of_unit(split_log, grain, KEYS_LOG, CHUNK_LOG, SPLIT_LOG)
        own_units = num_units(span, unit_log)
        chunk_mask = (1 << (split_log - (SPLIT_LOG - CHUNK_LOG))) - 1
        split_mask = (1 << split_log) - 1
        first = unit << unit_log
        stop = tl.minimum((unit + 1) << unit_log, span)
        row = first_row + tl.arange(0, ROWS)
        queries = load_queries(
            query,
            first_query,
            num_rows,
            row,
            kv_head,
            token_stride,
            head_stride,
            GROUP,
            DIM,
            DIM_PAD,
        )
        last_visible = context_len - num_rows // GROUP + row // GROUP
        if not CAUSAL:
            last_visible = last_visible * 0 + (context_len - 1)
        table = block_tables + b.to(tl.int64) * table_width
        nothing = tl.zeros([ROWS, DIM_PAD], tl.float32)
        no_sum = tl.zeros([ROWS, 1], tl.float32)
        top = tl.full([ROWS, 1], NO_TOP, tl.float32)  # all sums are relative to this
        chunk, chunk_sum = nothing, no_sum
        split, split_sum = nothing, no_sum
        acc, total = nothing, no_sum
        for start in tl.range(first, stop, KEYS):
            if (start & chunk_mask) == 0:
                split, split_sum = split + chunk, split_sum + chunk_sum
                chunk, chunk_sum = nothing, no_sum
                if (start & split_mask) == 0:
                    acc, total = acc + split, total + split_sum
                    split, split_sum = nothing, no_sum
            tile, tile_top, tile_sum = _attend_to_tile(
                queries,
                last_visible,
                base + start,
                base + stop,
                kv_cache,
                value_offset,
                table,
                kv_head,
                scale_log2,
                KEYS,
                KV_HEADS,
                BLOCK_SIZE,
                DIM,
                DIM_PAD,
                PRECISION,
                WINDOW,
                CAP_SCALE,
            )
            new_top = tl.maximum(top, tile_top)
            shrink = tl.exp2(top - new_top)
            share = tl.exp2(tile_top - new_top)
            chunk = tl.fma(tile, share, chunk * shrink)
            chunk_sum = tl.fma(tile_sum, share, chunk_sum * shrink)
            split, split_sum = split * shrink, split_sum * shrink
            acc, total = acc * shrink, total * shrink
            top = new_top
        acc, total = acc + (split + chunk), total + (split_sum + chunk_sum)
        if own_units == 1:
            store_rows(
                out, acc, total, first_query, num_rows, row, kv_head, KV_HEADS, GROUP, DIM, DIM_PAD
            )
        else:
            first_part = first_unit * KV_HEADS + kv_head
            slot = (first_part + unit * KV_HEADS).to(tl.int64) * max_rows
            column = tl.arange(0, DIM_PAD)
            exists = (row < num_rows)[:, None]
            tl.store(
                parts + (slot * DIM + row[:, None] + column[None, :] * max_rows),
                acc,
                mask=exists & (column < DIM)[None, :],
            )
            tl.store(tops + slot + row[:, None], top, mask=exists)
            tl.store(sums + slot + row[:, None], total, mask=exists)
            tl.debug_barrier()  # the one thread that arrives does so after the stores of all
            place = arrivals + FIRST_ARRIVAL + b * HEADS + item % HEADS
            if tl.atomic_add(place, 1, sem="acq_rel") == own_units - 1:
                tl.store(place, 0)
                last_row = tl.minimum(first_row + ROWS, num_rows)
                for query_row in tl.range(first_row, last_row, GROUP):
                    combine(
                        out,
                        parts,
                        tops,
                        sums,
                        first_part,
                        own_units,
                        unit_log,
                        chunk_mask,
                        split_mask,
                        first_query,
                        num_rows,
                        query_row,
                        max_rows,
                        kv_head,
                        KV_HEADS,
                        GROUP,
                        GROUP_PAD,
                        DIM,
                        DIM_PAD,
                        AT_ONCE,
                    )
        if num_items > num_programs:
            ticket = tl.atomic_add(arrivals, 1, sem="relaxed")
            # Every program draws one ticket too many, so this is the very last.
            if ticket == num_items - 1:
                tl.store(arrivals, 0)
            item = ticket + num_programs
        else:
            item = num_items
    zeros = tl.zeros([1024], out.dtype.element_ty)
    for token in tl.range(num_owned + tl.program_id(0), num_tokens, num_programs):
        line = out + tl.cast(token, tl.int64) * (KV_HEADS * GROUP * DIM)
        for first in tl.range(0, KV_HEADS * GROUP * DIM, 1024):
            column = first + tl.arange(0, 1024)
            tl.store(line + column, zeros, mask=column < KV_HEADS * GROUP * DIM)
