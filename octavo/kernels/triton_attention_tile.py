"""What Triton's attention kernels share: rows of queries, tiles of keys, and whose turn it is.

Row r of a (sequence, kv head) is query r // GROUP of the sequence and head r % GROUP of those that
share the kv head, so that a key is read once for the whole group (GQA packing). Each sequence has a
number of units of work; a program counts those of all sequences in registers to find its own, so
that neither the grid nor the host knows how long anything is. Does not know what a unit is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.paged_attention import PLAIN, AttentionKind

# Sequences counted at once, a power of 8 so that few variants are ever compiled.
LEAST_COUNTED = 16


def counted_at_once(num_sequences: int) -> int:
    """BATCH_PAD for a batch."""
    count = LEAST_COUNTED
    while count < num_sequences:
        count *= 8
    return count


def kind_constants(kind: AttentionKind, scale: float) -> dict[str, Any]:
    """What of a kind is compiled in. Plain attention names nothing: kernels default to it."""
    if kind is PLAIN:
        return {}
    return {
        "WINDOW": kind.window or 0,
        "CAP_SCALE": scale / kind.softcap if kind.softcap else 0.0,
        "CAUSAL": kind.causal,
    }


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; the interpreter has as many as make its programs loop."""
    if not tensor.is_cuda:
        return 3
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@triton.jit
def load_lengths(query_starts, context_lens, num_sequences, BATCH_PAD: tl.constexpr):
    """Each sequence's number of queries and context, [BATCH_PAD]; zeros beyond the batch."""
    b = tl.arange(0, BATCH_PAD)
    exists = b < num_sequences
    starts = tl.load(query_starts + b, mask=exists, other=0)
    stops = tl.load(query_starts + b + 1, mask=exists, other=0)
    return stops - starts, tl.load(context_lens + b, mask=exists, other=0)


@triton.jit
def owner_of(unit, units, ends):
    """The sequence that has a unit, and the first unit it has. `ends` is the sum up to it."""
    before = ends <= unit
    # Both in one reduction: the count of the sequences before, and the sum of their units.
    both = tl.sum(tl.where(before, units.to(tl.int64) + (1 << 40), 0), 0)
    return (both >> 40).to(tl.int32), (both & ((1 << 40) - 1)).to(tl.int32)


@triton.jit
def load_queries(
    query,
    first_query,
    num_rows,
    row,
    kv_head,
    token_stride,
    head_stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """[ROWS, DIM_PAD], zeros from `num_rows` on."""
    token = (first_query + row // GROUP).to(tl.int64)
    head = (kv_head * GROUP + row % GROUP).to(tl.int64)
    column = tl.arange(0, DIM_PAD)
    places = query + (token * token_stride + head * head_stride)[:, None] + column[None, :]
    return tl.load(places, mask=(row < num_rows)[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def load_keys_and_values(
    position,
    exists,
    cache,
    value_offset,
    table,
    kv_head,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Of the context positions [KEYS]: two of [KEYS, DIM_PAD], zeros where nothing exists."""
    column = tl.arange(0, DIM_PAD)
    if MASKED:
        block = tl.load(table + position // BLOCK_SIZE, mask=exists, other=0)
    else:
        block = tl.load(table + position // BLOCK_SIZE)
    line = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
    places = cache + (line * DIM)[:, None] + column[None, :]
    if MASKED or DIM != DIM_PAD:
        there = exists[:, None] & (column < DIM)[None, :]
        keys = tl.load(places, mask=there, other=0.0)
        values = tl.load(places + value_offset, mask=there, other=0.0)
    else:
        keys = tl.load(places)
        values = tl.load(places + value_offset)
    return keys, values


@triton.jit
def capped(scores, CAP_SCALE: tl.constexpr):
    """tanh(scores * CAP_SCALE), as 1 - 2 / (1 + e^2x) says: the softmax's scale is the cap then.

    The series where that would leave little of x has the coefficients of Cephes' tanhf.
    """
    x = scores * CAP_SCALE
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(square < 0.390625, near * square * x + x, far)


@triton.jit
def attend_to_keys(
    acc,
    row_top,
    row_sum,
    queries,
    last_visible,
    first,
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
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP_SCALE: tl.constexpr,
):
    """Adds context positions first:stop, a tile at a time, to the running softmax of the rows.

    MASKED: some row may not see some position before `stop`, or the last tile is a partial one. Two
    loops, one without masks, are a seventh faster than one that decides for each tile.
    """
    if MASKED and WINDOW:
        first_seen = tl.min(last_visible, 0) - (WINDOW - 1)  # blocks before it may be anybody's
    for start in tl.range(first, stop, KEYS):
        position = start + tl.arange(0, KEYS)
        exists = position < stop
        if MASKED and WINDOW:
            exists &= position >= first_seen
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
            MASKED,
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [ROWS, KEYS]
        if CAP_SCALE != 0.0:
            scores = capped(scores, CAP_SCALE)
        if MASKED:
            seen = (position[None, :] <= last_visible[:, None]) & exists[None, :]
            if WINDOW:
                seen &= position[None, :] > (last_visible - WINDOW)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(row_top, tl.max(scores, 1) * scale_log2)
        # A row that has seen nothing yet has a top of -inf, and -inf - -inf is no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(row_top - base)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION
        )
        row_top = new_top
    return acc, row_top, row_sum


@triton.jit
def store_rows(
    out,
    acc,
    row_sum,
    first_query,
    num_rows,
    row,
    kv_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """The weighted means; zeros for a row that saw nothing. The sums are [ROWS, 1] or wider."""
    mixed = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    column = tl.arange(0, DIM_PAD)
    line = (first_query + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP)
    line += kv_head * GROUP + row % GROUP
    there = (row < num_rows)[:, None] & (column < DIM)[None, :]
    tl.store(
        out + line[:, None] * DIM + column[None, :], mixed.to(out.dtype.element_ty), mask=there
    )
