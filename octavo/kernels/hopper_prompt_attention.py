"""Attention of prompts over the paged KV cache with Hopper's own instructions, in Gluon.

After FlashAttention-3 (arXiv 2407.08608): one warp copies tiles of queries, keys and values to
shared memory by TMA; two warpgroups of 64 rows each multiply them by wgmma, and while the softmax
of one tile of keys runs, the product of the next is under way (section 3.2, algorithm 2). Programs
stay for many tiles of rows, so that the copies for the next one begin before this one ends.

Rows are packed as in `triton_attention_tile`: row r is query r // GROUP, head r % GROUP.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.paged_attention import AttentionBatch
from octavo.kernels.triton_attention_tile import multiprocessors
from octavo.kernels.triton_decode_attention import LOG2_E
from octavo.kernels.triton_launch import launch, launch_options
from octavo.kernels.triton_paged_attention import attend_to_all

CONSUMERS = gl.constexpr(2)  # warpgroups that multiply
CONSUMER_ROWS = gl.constexpr(64)  # what one wgmma holds
TILE_ROWS = 128
TILE_KEYS = 128
STAGES = 2  # tiles of keys, and as many of values, in shared memory at once
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
# Rows of 128 bytes, swizzled as wgmma reads them; three dimensions, as copies are of [1, keys, D].
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
# Sequences counted at once.
COUNTED = (128, 512, 2048)


def hopper_paged_attention(
    query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    """As PagedAttention and `triton_paged_attention`; for 16-bit values and heads of 64 or 128.

    The query heads of a kv head are a power of two, at most 64, and so is the block size, which is
    8 at least. The predicate is `octavo.kernels.paged_attention`'s.
    """
    return attend_to_all(query, kv_cache, batch, scale, attend_with_many_queries)


def attend_with_many_queries(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    few: int,
) -> None:
    """Writes the rows of `out` [T, Hq, D] of the sequences with more than `few` queries."""
    num_tokens, num_heads, dim = query.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = batch.block_tables.shape
    group = num_heads // num_kv_heads
    copied_keys = min(block_size, TILE_KEYS)
    lines = kv_cache.view(-1, block_size, dim)
    queries_at_once = [CONSUMER_ROWS.value // group, group, dim]
    most_long = min(num_sequences, num_tokens // (few + 1))
    most_tiles = (num_tokens * group // TILE_ROWS + most_long) * num_kv_heads
    launch(_attend, (min(most_tiles, multiprocessors(query)),))(
        TensorDescriptor(
            query, list(query.shape), list(query.stride()), queries_at_once, TILE_LAYOUT
        ),
        TensorDescriptor.from_tensor(lines, [1, copied_keys, dim], TILE_LAYOUT),
        out,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        num_sequences,
        table_width,
        num_blocks * num_kv_heads,
        scale * LOG2_E,
        BATCH_PAD=_counted_at_once(num_sequences),
        ROWS=TILE_ROWS,
        KEYS=TILE_KEYS,
        STAGES=STAGES,
        FEW_QUERIES=few,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        DIM=dim,
        **launch_options(),
        num_warps=4,
        num_stages=1,
    )


def _counted_at_once(num_sequences: int) -> int:
    """BATCH_PAD for a batch: one of few, so that few variants are compiled."""
    fitting = [count for count in COUNTED if count >= num_sequences]
    return fitting[0] if fitting else int(triton.next_power_of_2(num_sequences))


@gluon.jit(
    do_not_specialize=["num_sequences", "table_width", "num_lines"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "block_tables"],
)
def _attend(
    queries,
    lines,
    out,
    query_starts,
    context_lens,
    block_tables,
    num_sequences,
    table_width,
    num_lines,
    scale_log2,
    BATCH_PAD: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    FEW_QUERIES: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    DIM: gl.constexpr,
    PDL: gl.constexpr,
):
    """Counts the tiles of all sequences, then parts the warps by what they do.

    `queries` [T, Hq, D] and `lines` [2 * num_lines, BLOCK_SIZE, D] are TMA descriptors; a line is
    one block of one kv head, first those of keys, then those of values.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counting: gl.constexpr = gl.BlockedLayout([BATCH_PAD // 32], [32], [4], [0])
    b = gl.arange(0, BATCH_PAD, counting)
    exists = b < num_sequences
    starts = gl.load(query_starts + b, mask=exists, other=0)
    num_queries = gl.load(query_starts + b + 1, mask=exists, other=0) - starts
    tiles = gl.where(num_queries > FEW_QUERIES, gl.cdiv(num_queries * GROUP, ROWS), 0)
    ends = gl.associative_scan(tiles, 0, _add)
    num_units = gl.max(ends, 0) * KV_HEADS
    tile_ends = gl.allocate_shared_memory(
        gl.int32, [BATCH_PAD], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tile_ends.store(ends)

    dtype: gl.constexpr = out.dtype.element_ty
    copied: gl.constexpr = BLOCK_SIZE if BLOCK_SIZE < KEYS else KEYS
    layout: gl.constexpr = lines.layout
    keys_shape: gl.constexpr = [STAGES, KEYS // copied, copied, DIM]
    keys = _make_ring(dtype, keys_shape, layout, CONSUMERS)
    values = _make_ring(dtype, keys_shape, layout, CONSUMERS)
    rows_shape: gl.constexpr = [CONSUMERS, CONSUMER_ROWS // GROUP, GROUP, DIM]
    rows = _make_ring(dtype, rows_shape, layout, 1)
    fence_async_shared()
    batch = (query_starts, context_lens, tile_ends, num_units)
    cache = (block_tables, table_width, num_lines)
    first = (out, rows, keys, values, batch, scale_log2, 0, ROWS, KV_HEADS, GROUP)
    second = (out, rows, keys, values, batch, scale_log2, 1, ROWS, KV_HEADS, GROUP)
    copies = (queries, lines, rows, keys, values, batch, cache, ROWS, KV_HEADS, GROUP, BLOCK_SIZE)
    gl.warp_specialize(
        [(_multiply, first), (_multiply, second), (_copy, copies)],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _make_ring(
    dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, readers: gl.constexpr
):
    """Tiles in shared memory, and two barriers for each: it was filled, and all have read it."""
    num_tiles: gl.constexpr = shape[0]
    tiles = gl.allocate_shared_memory(dtype, shape, layout)
    filled = gl.allocate_shared_memory(gl.int64, [num_tiles, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [num_tiles, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num_tiles):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(free.index(i), count=readers)
    return tiles, filled, free


@gluon.jit
def _copy(
    queries,
    lines,
    rows,
    keys,
    values,
    batch,
    cache,
    ROWS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """The copying warp: tiles in the order in which they are multiplied, as soon as there is room.

    The last keys come first, so that only the first steps of a tile need masks.
    """
    stages: gl.constexpr = keys[0].shape[0]
    step_keys: gl.constexpr = keys[0].shape[1] * keys[0].shape[2]
    block_tables, table_width, num_lines = cache
    num_units = batch[3]
    count = 0
    free_phase = 1  # of the query tiles: the first time nobody has to give them back
    for turn in range(_num_turns(num_units)):
        kv_head, b, first_row = _find_tile(turn, batch, ROWS, KV_HEADS)
        first_query, num_queries, num_before = _load_sequence(b, batch)
        for i in gl.static_range(CONSUMERS):
            first_token = first_query + (first_row + i * CONSUMER_ROWS) // GROUP
            tile, filled, free = rows[0].index(i), rows[1].index(i), rows[2].index(i)
            mbarrier.wait(free, free_phase)
            mbarrier.expect(filled, queries.block_type.nbytes)
            tma.async_copy_global_to_shared(
                queries, [first_token, kv_head * GROUP, 0], filled, tile
            )
        free_phase ^= 1
        stop = _stop_of(first_row, num_queries, num_before, ROWS, GROUP)
        table = block_tables + b.to(gl.int64) * table_width
        for step in range(_num_steps(stop, step_keys) - 1, -1, -1):
            stage, phase = count % stages, count // stages & 1
            line = table, kv_head, num_lines, step * step_keys, stop
            _copy_tile(lines, keys, stage, phase, line, 0, KV_HEADS, BLOCK_SIZE)
            _copy_tile(lines, values, stage, phase, line, num_lines, KV_HEADS, BLOCK_SIZE)
            count += 1


@gluon.jit
def _copy_tile(
    lines, ring, stage, phase, place, half, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr
):
    """Copy keys (half 0) or values (half `num_lines`) of one step, zeros where there are none.

    A copy cannot end within a block. So that nothing behind `stop` is read (stale values may be no
    numbers), the copy of the last block begins earlier by what is missing: its keys stand at the
    end of their place, behind zeros or keys that `_masked` hides.
    """
    table, kv_head, num_lines, first_key, stop = place
    num_copies: gl.constexpr = ring[0].shape[1]
    copied: gl.constexpr = ring[0].shape[2]
    tile, filled, free = ring[0].index(stage), ring[1].index(stage), ring[2].index(stage)
    mbarrier.wait(free, phase ^ 1)
    mbarrier.expect(filled, lines.block_type.nbytes * num_copies)
    for i in gl.static_range(num_copies):
        first = first_key + i * copied
        exists = first < stop
        block = gl.load(table + first // BLOCK_SIZE, mask=exists, other=0)
        # Beyond all lines there are zeros.
        line = gl.where(exists, block * KV_HEADS + kv_head + half, 2 * num_lines)
        row = first % BLOCK_SIZE - gl.maximum(first + copied - stop, 0)
        tma.async_copy_global_to_shared(
            lines, [line, gl.where(exists, row, 0), 0], filled, tile.slice(i, 1, 0)
        )


@gluon.jit
def _multiply(
    out,
    rows,
    keys,
    values,
    batch,
    scale_log2,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warpgroup: rows WHICH * 64 to WHICH * 64 + 63 of each tile over all that they see."""
    stages: gl.constexpr = keys[0].shape[0]
    step_keys: gl.constexpr = keys[0].shape[1] * keys[0].shape[2]
    copied: gl.constexpr = keys[0].shape[2]
    dim: gl.constexpr = keys[0].shape[3]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, step_keys, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    no_scores = gl.zeros([CONSUMER_ROWS, step_keys], gl.float32, scores_layout)
    queries = rows[0].index(WHICH).reshape([CONSUMER_ROWS, dim])
    num_units = batch[3]
    count = 0
    queries_phase = 0
    for turn in range(_num_turns(num_units)):
        kv_head, b, first_row = _find_tile(turn, batch, ROWS, KV_HEADS)
        first_query, num_queries, num_before = _load_sequence(b, batch)
        stop = _stop_of(first_row, num_queries, num_before, ROWS, GROUP)
        num_steps = _num_steps(stop, step_keys)
        first_row += WHICH * CONSUMER_ROWS
        row = first_row + gl.arange(0, CONSUMER_ROWS, score_rows)
        last_visible = num_before + row // GROUP
        unmasked_steps = (num_before + first_row // GROUP + 1) // step_keys

        stage, phase = count % stages, count // stages & 1
        mbarrier.wait(rows[1].index(WHICH), queries_phase)
        queries_phase ^= 1
        mbarrier.wait(keys[1].index(stage), phase)
        key_tile = keys[0].index(stage).reshape([step_keys, dim]).permute((1, 0))
        pending = warpgroup_mma(queries, key_tile, no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(keys[2].index(stage), count=1)
        scores = _masked(scores, (num_steps - 1) * step_keys, stop, last_visible, copied)
        acc = gl.zeros([CONSUMER_ROWS, dim], gl.float32, acc_layout)
        row_top = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, score_rows)
        weights, row_top, shrink = _weigh(scores, row_top, scale_log2)
        row_sum = gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(out.dtype.element_ty), weights_layout)

        for step in range(num_steps - 2, -1, -1):
            next_stage, next_phase = (count + 1) % stages, (count + 1) // stages & 1
            mbarrier.wait(keys[1].index(next_stage), next_phase)
            key_tile = keys[0].index(next_stage).reshape([step_keys, dim]).permute((1, 0))
            pending = warpgroup_mma(queries, key_tile, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(values[1].index(stage), phase)
            value_tile = values[0].index(stage).reshape([step_keys, dim])
            pending_acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[pending])
            mbarrier.arrive(keys[2].index(next_stage), count=1)
            if step >= unmasked_steps:
                scores = _masked(scores, step * step_keys, stop, last_visible, copied)
            next_weights, row_top, shrink = _weigh(scores, row_top, scale_log2)
            row_sum = row_sum * shrink + gl.sum(next_weights, 1)
            next_weights = next_weights.to(out.dtype.element_ty)
            acc, weights = warpgroup_mma_wait(0, deps=[pending_acc, weights])
            mbarrier.arrive(values[2].index(stage), count=1)
            acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
            weights = gl.convert_layout(next_weights, weights_layout)
            stage, phase = next_stage, next_phase
            count += 1

        mbarrier.arrive(rows[2].index(WHICH), count=1)
        mbarrier.wait(values[1].index(stage), phase)
        value_tile = values[0].index(stage).reshape([step_keys, dim])
        pending_acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[pending_acc, weights])
        mbarrier.arrive(values[2].index(stage), count=1)
        count += 1
        row_sum = gl.convert_layout(gl.where(row_sum == 0.0, 1.0, row_sum), acc_rows)
        place = first_query, num_queries, first_row, kv_head
        _store_rows(out, acc / row_sum[:, None], place, KV_HEADS, GROUP)


@gluon.jit
def _masked(scores, first_key, stop, last_visible, COPIED: gl.constexpr):
    """Scores [rows, keys] of keys first_key and on, -inf where a row does not see a key."""
    keys: gl.constexpr = scores.shape[1]
    column = gl.arange(0, keys, gl.SliceLayout(0, scores.type.layout))
    # Where the last copy is of a block that is not full, it was shifted: see `_copy_tile`.
    copy = column // COPIED
    last_copy = (stop - 1 - first_key) // COPIED
    shift = (last_copy + 1) * COPIED - (stop - first_key)
    key = column - gl.where(copy == last_copy, shift, 0)
    exists = (key >= copy * COPIED) & (copy <= last_copy)
    seen = exists[None, :] & (first_key + key[None, :] <= last_visible[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _weigh(scores, row_top, scale_log2):
    """Weights of the running softmax, the rows' new tops, and what older sums are multiplied by."""
    new_top = gl.maximum(row_top, gl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet has a top of -inf, and -inf - -inf is no number.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    return gl.exp2(scores * scale_log2 - base[:, None]), new_top, gl.exp2(row_top - base)


@gluon.jit
def _store_rows(out, mixed, place, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Write [64, D] to the rows of a tile that exist, through a layout of 16 bytes a thread."""
    first_query, num_queries, first_row, kv_head = place
    dim: gl.constexpr = mixed.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    mixed = gl.convert_layout(mixed.to(out.dtype.element_ty), layout)
    row = first_row + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, dim, gl.SliceLayout(0, layout))
    line = (first_query + row // GROUP).to(gl.int64) * (KV_HEADS * GROUP)
    line += kv_head * GROUP + row % GROUP
    exists = (row < num_queries * GROUP)[:, None]
    gl.store(out + line[:, None] * dim + column[None, :], mixed, mask=exists)


@gluon.jit
def _place_in_turn(turn):
    """Which of a turn's units a program takes: there and back, so that all get as much to do.

    Units become shorter from one to the next. In one direction, the first program would get the
    longest in every turn.
    """
    last = gl.num_programs(0) - 1
    return gl.where(turn % 2 == 0, gl.program_id(0), last - gl.program_id(0))


@gluon.jit
def _num_turns(num_units):
    """In how many turns a program has a unit; only the last turn has none for some."""
    full_turns = num_units // gl.num_programs(0)
    left = num_units % gl.num_programs(0)
    return full_turns + (_place_in_turn(full_turns) < left).to(gl.int32)


@gluon.jit
def _find_tile(turn, batch, ROWS: gl.constexpr, KV_HEADS: gl.constexpr):
    """The kv head, sequence and first row that a program takes in a turn.

    The last tiles come first: under a causal mask they are the longest. Heads are fastest.
    """
    tile_ends, num_units = batch[2], batch[3]
    index = num_units - 1 - turn * gl.num_programs(0) - _place_in_turn(turn)
    tile = index // KV_HEADS
    count: gl.constexpr = tile_ends.shape[0]
    # Each warp counts for itself.
    ends = tile_ends.load(gl.BlockedLayout([count // 32], [32], [gl.num_warps()], [0]))
    before = ends <= tile
    first_tile = gl.max(gl.where(before, ends, 0), 0)
    return index % KV_HEADS, gl.sum(before.to(gl.int32), 0), (tile - first_tile) * ROWS


@gluon.jit
def _load_sequence(b, batch):
    """Its first query, its number of queries, and of the tokens before those."""
    first_query = gl.load(batch[0] + b)
    num_queries = gl.load(batch[0] + b + 1) - first_query
    return first_query, num_queries, gl.load(batch[1] + b) - num_queries


@gluon.jit
def _stop_of(first_row, num_queries, num_before, ROWS: gl.constexpr, GROUP: gl.constexpr):
    """The end of the context that the last row of a tile sees."""
    last_row = gl.minimum(first_row + ROWS, num_queries * GROUP) - 1
    return num_before + last_row // GROUP + 1


@gluon.jit
def _num_steps(stop, step_keys: gl.constexpr):
    """One at least: whoever sees nothing gets zeros by the same way."""
    return gl.maximum(gl.cdiv(stop, step_keys), 1)


@gluon.jit
def _add(a, b):
    return a + b
