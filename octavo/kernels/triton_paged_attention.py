"""Attention over the paged KV cache in Triton: one kernel for few queries, one for many.

Owns the choice and the kernel for many queries, a running softmax (arXiv 2205.14135, algorithm 1);
`triton_decode_attention` has the other, `hopper_prompt_attention` a faster one for many. Does not
know requests, nor how blocks were allocated.

Both kernels read every length on the device, so a CUDA graph captured at bounds serves any batch
within them: sequences past the last real one have no queries and a context of 0.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.paged_attention import (
    PLAIN,
    TRITON_MAX_DIM,
    AttentionBatch,
    AttentionKind,
)
from octavo.kernels.triton_attention_tile import (
    attend_to_keys,
    counted_at_once,
    kind_constants,
    load_lengths,
    load_queries,
    owner_of,
    store_rows,
)
from octavo.kernels.triton_decode_attention import (
    LOG2_E,
    STEP_TENSORS,
    attend_with_few_queries,
    most_queries,
)
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

# (bytes of an element, padded head size) -> rows and keys of a tile, warps, stages
TILES = {
    (2, 64): (256, 128, 8, 3),
    (2, 128): (256, 64, 8, 3),
    (2, 256): (128, 64, 8, 3),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 32, 4, 2),
    (4, 256): (16, 16, 4, 2),
}


class AttendWithMany(Protocol):
    def __call__(
        self,
        query: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        batch: AttentionBatch,
        scale: float,
        *,
        few: int,
    ) -> None:
        """Writes the rows of `out` [T, Hq, D] of the sequences with more than `few` queries."""
        ...


def triton_paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """As PagedAttention, for any block size and head sizes up to 256.

    A query that sees nothing (a context of 0) and a token of no sequence (beyond query_starts[B])
    get zeros. `max_query_len` may be any bound; `max_context_len` is not looked at.
    """
    if kind is PLAIN:
        return attend_to_all(query, kv_cache, batch, scale, attend_with_many_queries)
    attend_with_many = partial(attend_with_many_queries, kind=kind)
    return attend_to_all(query, kv_cache, batch, scale, attend_with_many, kind)


def attend_to_all(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    attend_with_many: AttendWithMany,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """PagedAttention by two kernels: one for the sequences with few queries, and this for others.

    Which sequences those are is found on the device, by each kernel for itself.
    """
    out = _empty_result(query, kv_cache, batch)
    num_tokens, num_heads, _ = query.shape
    few = most_queries(num_heads // kv_cache.shape[2])
    if num_tokens and len(batch.context_lens):
        if min(batch.max_query_len, num_tokens) > few:
            attend_with_many(query, kv_cache, out, batch, scale, few=few)
        # Always: that no sequence has few queries cannot be told from bounds.
        attend_with_few_queries(query, kv_cache, out, batch, scale, kind)
    return out


def triton_invariant_paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """As PagedAttention, by the kernel for many queries alone, which reads a context in one order.

    So a token has the same bits in a decode and in a prompt, however that was cut. What it costs:
    a decode has one program a kv head, and fills 16th parts of its tiles.
    """
    out = _empty_result(query, kv_cache, batch).zero_()  # tokens of no sequence are not written
    if len(query) and len(batch.context_lens):
        attend_with_many_queries(query, kv_cache, out, batch, scale, few=0, kind=kind)
    return out


def _empty_result(query: Tensor, kv_cache: Tensor, batch: AttentionBatch) -> Tensor:
    """[T, Hq, D], not yet written unless there is nothing to write; refuses what does not fit."""
    num_tokens, num_heads, dim = query.shape
    halves, _, num_kv_heads, _, cache_dim = kv_cache.shape
    if halves != 2 or cache_dim != dim or dim > TRITON_MAX_DIM or num_heads % num_kv_heads:
        rule = "kv_cache is [2, blocks, Hkv, block_size, D], D at most 256, Hq a multiple of Hkv"
        raise refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    if query.stride(2) != 1 or not kv_cache.is_contiguous() or query.dtype is not kv_cache.dtype:
        rule = "dense heads, a contiguous cache, one dtype"
        raise refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    out = query.new_empty(num_tokens, num_heads, dim)
    return out if len(batch.context_lens) else out.zero_()


def attend_with_many_queries(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    few: int,
    kind: AttentionKind = PLAIN,
) -> None:
    """Writes the rows of `out` [T, Hq, D] of the sequences with more than `few` queries."""
    num_tokens, num_heads, dim = query.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = batch.block_tables.shape
    group = num_heads // num_kv_heads
    dim_pad = max(16, triton.next_power_of_2(dim))
    rows, keys, warps, stages = TILES[query.element_size(), max(64, dim_pad)]
    # Every sequence has a partial tile at most, so there are no more tiles than this.
    most_long = min(num_sequences, num_tokens // (few + 1))
    most_tiles = num_tokens * group // rows + most_long
    launch(_attend, (most_tiles * num_kv_heads,))(
        *(query, kv_cache, out, batch.query_starts, batch.context_lens, batch.block_tables),
        num_sequences,
        table_width,
        num_blocks * num_kv_heads * block_size * dim,
        query.stride(0),
        query.stride(1),
        (kind.softcap or scale) * LOG2_E,
        # The compiler spills more registers where fewer are counted.
        BATCH_PAD=counted_at_once(max(128, num_sequences)),
        ROWS=rows,
        KEYS=keys,
        FEW_QUERIES=few,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        DIM=dim,
        DIM_PAD=dim_pad,
        # Triton would round fp32 operands to tf32 otherwise.
        PRECISION="ieee" if query.element_size() == 4 else "tf32",
        **launch_options(),
        **kind_constants(kind, scale),
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit(
    do_not_specialize=["num_sequences", "table_width"],
    do_not_specialize_on_alignment=STEP_TENSORS,
)
def _attend(
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
    scale_log2,
    BATCH_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FEW_QUERIES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    WINDOW: tl.constexpr = 0,
    CAP_SCALE: tl.constexpr = 0.0,
    CAUSAL: tl.constexpr = True,
):
    """One tile of rows of one (sequence, kv head) over all that it sees; heads are fastest.

    The last tiles come first: under a causal mask they are the longest. Programs past the last tile
    end at once; a loop over tiles instead would cost the loop over keys its registers.
    """
    allow_next(PDL)
    wait_for_inputs(PDL)
    queries_of, _ = load_lengths(query_starts, context_lens, num_sequences, BATCH_PAD)
    tiles = tl.where(queries_of > FEW_QUERIES, tl.cdiv(queries_of * GROUP, ROWS), 0)
    ends = tl.cumsum(tiles, 0)
    index = tl.max(ends, 0) * KV_HEADS - 1 - tl.program_id(0)
    if index < 0:
        return
    kv_head = index % KV_HEADS
    tile = index // KV_HEADS
    b, first_tile = owner_of(tile, tiles, ends)
    first_query = tl.load(query_starts + b)
    num_queries = tl.load(query_starts + b + 1) - first_query
    num_rows = num_queries * GROUP
    first_row = (tile - first_tile) * ROWS
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
    num_before = tl.load(context_lens + b) - num_queries
    last_visible = num_before + row // GROUP
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    stop = num_before + last_row // GROUP + 1
    stop_of_full = (num_before + first_row // GROUP + 1) // KEYS * KEYS  # every row sees these
    if not CAUSAL:
        stop = num_before + num_queries
        last_visible = last_visible * 0 + (stop - 1)
        stop_of_full = stop // KEYS * KEYS
    table = block_tables + tl.cast(b, tl.int64) * table_width
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    row_top = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    first_of_full = 0
    if WINDOW:
        # The tiles where windows begin: between them and `stop_of_full` every row sees all again.
        first = tl.maximum(num_before + first_row // GROUP + 1 - WINDOW, 0) // KEYS * KEYS
        first_of_full = tl.minimum(tl.cdiv(tl.maximum(stop - WINDOW, 0), KEYS) * KEYS, stop)
        stop_of_full = tl.maximum(first_of_full, stop_of_full)
        acc, row_top, row_sum = attend_to_keys(
            acc,
            row_top,
            row_sum,
            queries,
            last_visible,
            first,
            first_of_full,
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
            WINDOW,
            CAP_SCALE,
        )
    acc, row_top, row_sum = attend_to_keys(
        acc,
        row_top,
        row_sum,
        queries,
        last_visible,
        first_of_full,
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
        WINDOW,
        CAP_SCALE,
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
        WINDOW,
        CAP_SCALE,
    )
    store_rows(
        out,
        acc,
        row_sum[:, None],
        first_query,
        num_rows,
        row,
        kv_head,
        KV_HEADS,
        GROUP,
        DIM,
        DIM_PAD,
    )
