"""Causal attention over the paged KV cache in Triton: one kernel for few queries, one for many.

Owns the launch geometry; what a tile does, a running softmax (arXiv 2205.14135, algorithm 1), is in
`triton_attention_tile`. Does not know requests, nor how blocks were allocated.

Few queries (a decode, a short draft) are bound by the read of the cache, so their context is split
among programs and the parts are combined (split-KV, "Flash-Decoding"). How a context is split
depends on its own length only: a decoded token has the same bits whatever is beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.paged_attention import TRITON_MAX_DIM, AttentionBatch
from octavo.kernels.triton_attention_tile import attend_to_keys, load_queries, store_rows
from octavo.kernels.triton_support import refuse

SPLIT_ROWS = 16  # rows of a tile in the split kernel: the fewest that the matrix units take
SPLIT_LEN = 256  # context tokens of one program, doubled until MAX_SPLITS cover the context
MAX_SPLITS = 32
COMBINED_AT_ONCE = 8
SEQUENCES_AT_ONCE = tl.constexpr(128)
LOG2_E = 1.4426950408889634
# What changes from step to step must not be compiled in: a step would wait for the compiler.
BATCH_TENSORS = ["query_starts", "context_lens", "block_tables"]

# (bytes of an element, padded head size) -> keys of a tile, warps, stages
SPLIT_TILES = {
    (2, 64): (128, 4, 3),
    (2, 128): (128, 4, 3),
    (2, 256): (32, 4, 3),
    (4, 64): (32, 4, 2),
    (4, 128): (32, 4, 2),
    (4, 256): (16, 4, 2),
}
# (bytes of an element, padded head size) -> rows and keys of a tile, warps, stages
TILES = {
    (2, 64): (256, 128, 8, 3),
    (2, 128): (256, 64, 8, 3),
    (2, 256): (128, 64, 8, 3),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 32, 4, 2),
    (4, 256): (16, 16, 4, 2),
}


def triton_paged_attention(
    query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    """As PagedAttention, for any block size and head sizes up to 256.

    A query that sees nothing (a context of 0, as padding has it) gets zeros.
    """
    num_tokens, num_heads, dim = query.shape
    halves, num_blocks, num_kv_heads, block_size, cache_dim = kv_cache.shape
    if halves != 2 or cache_dim != dim or dim > TRITON_MAX_DIM or num_heads % num_kv_heads:
        rule = "kv_cache is [2, blocks, Hkv, block_size, D], D at most 256, Hq a multiple of Hkv"
        raise refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    if query.stride(2) != 1 or not kv_cache.is_contiguous() or query.dtype is not kv_cache.dtype:
        rule = "dense heads, a contiguous cache, one dtype"
        raise refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    out = query.new_empty(num_tokens, num_heads, dim)
    num_sequences, table_width = batch.block_tables.shape
    if num_tokens == 0 or num_sequences == 0:
        return out
    group = num_heads // num_kv_heads
    # A chunk of so few tokens goes to the split kernel, a longer one to the tiled kernel.
    max_split_queries = max(1, SPLIT_ROWS // group)
    shared = (query, kv_cache, out, batch.query_starts, batch.context_lens, batch.block_tables)
    numbers = (
        num_sequences,
        table_width,
        num_blocks * num_kv_heads * block_size * dim,
        query.stride(0),
        query.stride(1),
        max_split_queries,
        scale * LOG2_E,
    )
    sizes = {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        # Triton would round fp32 operands to tf32 otherwise.
        "PRECISION": "ieee" if query.dtype is torch.float32 else "tf32",
    }
    tile = (query.element_size(), max(64, sizes["DIM_PAD"]))
    if batch.max_query_len > max_split_queries:
        rows, keys, warps, stages = TILES[tile]
        # Every sequence has a partial tile at most, so this many tiles suffice.
        num_tiles = num_tokens * group // rows + num_sequences
        _tiled[(num_tiles * num_kv_heads,)](
            *shared, *numbers, ROWS=rows, KEYS=keys, **sizes, num_warps=warps, num_stages=stages
        )
    if num_tokens < num_sequences * batch.max_query_len or batch.max_query_len <= max_split_queries:
        _split_and_combine(shared, numbers, sizes, batch, tile)
    return out


def _split_and_combine(
    shared: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    sizes: dict[str, int],
    batch: AttentionBatch,
    tile: tuple[int, int],
) -> None:
    keys, warps, stages = SPLIT_TILES[tile]
    num_sequences, group, dim = batch.context_lens.shape[0], sizes["GROUP"], sizes["DIM"]
    num_splits = min(MAX_SPLITS, triton.cdiv(batch.max_context_len, SPLIT_LEN))
    # Of a (sequence, kv head): the queries that the split kernel takes, times the group.
    max_rows = min(batch.max_query_len, max(1, SPLIT_ROWS // group)) * group
    rows = min(128, max(SPLIT_ROWS, triton.next_power_of_2(max_rows)))
    query = shared[0]
    num_parts = num_sequences * sizes["KV_HEADS"] * max_rows * num_splits if num_splits > 1 else 1
    parts = query.new_empty((num_parts, dim), dtype=torch.float32)
    tops_and_sums = query.new_empty((num_parts, 2), dtype=torch.float32)
    heads_and_tiles = sizes["KV_HEADS"] * triton.cdiv(max_rows, rows)
    _split[(heads_and_tiles, num_sequences, num_splits)](
        *shared,
        *numbers,
        parts,
        tops_and_sums,
        max_rows,
        num_splits,
        ROWS=rows,
        KEYS=keys,
        SPLIT_LEN=SPLIT_LEN,
        MAX_SPLITS=MAX_SPLITS,
        **sizes,
        num_warps=warps,
        num_stages=stages,
    )
    if num_splits > 1:
        _combine[(max_rows, sizes["KV_HEADS"], num_sequences)](
            *shared[2:5],
            numbers[5],
            parts,
            tops_and_sums,
            max_rows,
            num_splits,
            KV_HEADS=sizes["KV_HEADS"],
            GROUP=group,
            DIM=dim,
            DIM_PAD=sizes["DIM_PAD"],
            SPLIT_LEN=SPLIT_LEN,
            MAX_SPLITS=MAX_SPLITS,
            AT_ONCE=COMBINED_AT_ONCE,
            num_warps=1 if dim <= 64 else 2,
        )


@triton.jit
def _own_split_len(context_len, SPLIT_LEN: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """How a context is split: a matter of its own length, so that its batch changes no bit."""
    split_len = SPLIT_LEN
    while split_len * MAX_SPLITS < context_len:
        split_len *= 2
    return split_len


@triton.jit(
    do_not_specialize=["num_sequences", "table_width"],
    do_not_specialize_on_alignment=BATCH_TENSORS,
)
def _tiled(
    query,
    kv_cache,
    out,
    query_starts,
    context_lens,
    block_tables,
    num_sequences,
    table_width,
    value_offset,
    token_stride,
    head_stride,
    max_split_queries,
    scale_log2,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows of one (sequence, kv head) over all that it sees.

    The last tiles come first: under a causal mask they are the longest.
    """
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = index % KV_HEADS
    tile = index // KV_HEADS
    # Sequence b owns the tiles from query_starts[b] * GROUP // ROWS + b on; ours is the last
    # sequence whose first tile is not beyond `tile`. Counted, not searched: one load, no chain.
    low = -1
    for first_b in tl.range(0, num_sequences, SEQUENCES_AT_ONCE):
        b = first_b + tl.arange(0, SEQUENCES_AT_ONCE)
        start = tl.load(query_starts + b, mask=b < num_sequences, other=0)
        begun = (start * GROUP // ROWS + b <= tile) & (b < num_sequences)
        low += tl.sum(begun.to(tl.int32), 0)
    first_query = tl.load(query_starts + low)
    num_queries = tl.load(query_starts + low + 1) - first_query
    num_rows = num_queries * GROUP
    first_row = (tile - first_query * GROUP // ROWS - low) * ROWS
    if first_row >= num_rows or num_queries <= max_split_queries:
        return
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
    context_len = tl.load(context_lens + low)
    num_before = context_len - num_queries
    last_visible = num_before + row // GROUP
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    stop = num_before + last_row // GROUP + 1
    stop_of_full = (num_before + first_row // GROUP + 1) // KEYS * KEYS  # every row sees these
    table = block_tables + tl.cast(low, tl.int64) * table_width
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    row_top = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc, row_top, row_sum = attend_to_keys(
        acc,
        row_top,
        row_sum,
        queries,
        last_visible,
        0,
        stop_of_full,
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
        False,
    )
    acc, row_top, row_sum = attend_to_keys(
        acc,
        row_top,
        row_sum,
        queries,
        last_visible,
        stop_of_full,
        stop,
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
        True,
    )
    store_rows(
        out, acc, row_sum, first_query, num_rows, row, kv_head, KV_HEADS, GROUP, DIM, DIM_PAD
    )


@triton.jit(
    do_not_specialize=["num_sequences", "table_width", "max_rows", "num_splits"],
    do_not_specialize_on_alignment=BATCH_TENSORS,
)
def _split(
    query,
    kv_cache,
    out,
    query_starts,
    context_lens,
    block_tables,
    num_sequences,
    table_width,
    value_offset,
    token_stride,
    head_stride,
    max_split_queries,
    scale_log2,
    parts,
    tops_and_sums,
    max_rows,
    num_splits,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All rows of one (sequence, kv head), or ROWS of them, over one part of its context.

    Writes the result where one part is all of it, else the unnormalised sum, the top of the scores
    (in powers of two) and the sum of the weights.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    row = tl.program_id(0) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1)
    split = tl.program_id(2)
    first_query = tl.load(query_starts + b)
    num_queries = tl.load(query_starts + b + 1) - first_query
    context_len = tl.load(context_lens + b)
    split_len = _own_split_len(context_len, SPLIT_LEN, MAX_SPLITS)
    first = split * split_len
    if num_queries > max_split_queries or (first >= context_len and split > 0):
        return
    num_rows = num_queries * GROUP
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
    acc, row_top, row_sum = attend_to_keys(
        tl.zeros([ROWS, DIM_PAD], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        queries,
        context_len - num_queries + row // GROUP,
        first,
        tl.minimum(first + split_len, context_len),
        kv_cache,
        value_offset,
        block_tables + b.to(tl.int64) * table_width,
        kv_head,
        scale_log2,
        KEYS,
        KV_HEADS,
        BLOCK_SIZE,
        DIM,
        DIM_PAD,
        PRECISION,
        True,
    )
    if context_len <= split_len:
        store_rows(
            out, acc, row_sum, first_query, num_rows, row, kv_head, KV_HEADS, GROUP, DIM, DIM_PAD
        )
        return
    part = ((b.to(tl.int64) * KV_HEADS + kv_head) * max_rows + row) * num_splits + split
    column = tl.arange(0, DIM_PAD)
    exists = row < num_rows
    there = exists[:, None] & (column < DIM)[None, :]
    tl.store(parts + part[:, None] * DIM + column[None, :], acc, mask=there)
    tl.store(tops_and_sums + part * 2, row_top, mask=exists)
    tl.store(tops_and_sums + part * 2 + 1, row_sum, mask=exists)


@triton.jit(
    do_not_specialize=["max_rows", "num_splits"],
    do_not_specialize_on_alignment=BATCH_TENSORS[:2],
)
def _combine(
    out,
    query_starts,
    context_lens,
    max_split_queries,
    parts,
    tops_and_sums,
    max_rows,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One row of one (sequence, kv head): its parts, a fixed number at a time, in their order."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    first_query = tl.load(query_starts + b)
    num_queries = tl.load(query_starts + b + 1) - first_query
    context_len = tl.load(context_lens + b)
    split_len = _own_split_len(context_len, SPLIT_LEN, MAX_SPLITS)
    if num_queries > max_split_queries or row >= num_queries * GROUP or context_len <= split_len:
        return
    own_splits = tl.cdiv(context_len, split_len)
    first_part = ((b.to(tl.int64) * KV_HEADS + kv_head) * max_rows + row) * num_splits
    column = tl.arange(0, DIM_PAD)
    acc = tl.zeros([DIM_PAD], tl.float32)
    top = float("-inf")
    total = 0.0
    for start in tl.range(0, own_splits, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        exists = split < own_splits
        part = first_part + split
        tops = tl.load(tops_and_sums + part * 2, mask=exists, other=float("-inf"))
        sums = tl.load(tops_and_sums + part * 2 + 1, mask=exists, other=0.0)
        there = exists[:, None] & (column < DIM)[None, :]
        sums_of_values = tl.load(
            parts + part[:, None] * DIM + column[None, :], mask=there, other=0.0
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        shares = tl.exp2(tops - new_top)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink + tl.sum(sums_of_values * shares[:, None], 0)
        total = total * shrink + tl.sum(sums * shares, 0)
        top = new_top
    line = (first_query + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP)
    line += kv_head * GROUP + row % GROUP
    mixed = acc / total
    tl.store(out + line * DIM + column, mixed.to(out.dtype.element_ty), mask=column < DIM)
