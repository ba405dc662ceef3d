"""Attention within segments in Triton: a program for a tile of one segment's queries and a head.

Owns the kernel and its launch: a running softmax (arXiv 2205.14135, algorithm 1) without a mask
over keys that lie where the projections put them. The grid has as many tiles for each segment as
the longest has; those past a segment's end return at once. A row's bits depend on its own segment
alone: keys are read in one order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.encoder_attention import MOST_DIM, Segments
from octavo.kernels.triton_decode_attention import LOG2_E
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

# (bytes of an element, padded head size) -> queries and keys of a tile, warps, stages. Whatever the
# lengths are: other tiles might round otherwise, and then a row would depend on who else is there.
# A window of Qwen2.5-VL has 64 tokens.
TILES = {
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 64, 4, 3),
    (2, 256): (64, 32, 8, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 32, 4, 2),
    (4, 256): (16, 16, 4, 2),
}


def triton_encoder_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Segments, keys: Segments, scale: float
) -> Tensor:
    """As EncoderAttention; heads are dense, of at most 256 numbers."""
    num_tokens, num_heads, dim = query.shape
    if key.shape != value.shape or key.shape[1:] != (num_heads, dim) or dim > MOST_DIM:
        rule = f"query is [T, H, D], key and value [S, H, D], D at most {MOST_DIM}"
        raise refuse("encoder_attention", rule, query=query, key=key, value=value)
    dense = query.stride(2) == key.stride(2) == value.stride(2) == 1
    if not dense or not (query.dtype is key.dtype is value.dtype):
        raise refuse(
            "encoder_attention", "dense heads, one dtype", query=query, key=key, value=value
        )
    num_segments = len(queries.starts) - 1
    if len(keys.starts) != len(queries.starts):
        rule = "as many segments of keys as of queries"
        raise refuse("encoder_attention", rule, queries=queries.starts, keys=keys.starts)
    out = torch.empty((num_tokens, num_heads, dim), dtype=query.dtype, device=query.device)
    if num_tokens and num_segments:
        # No graph has this launch: a step whose longest segment is known makes no idle tiles.
        longest = min(queries.max_len, num_tokens)
        constants = _constants(dim, query.element_size())
        num_tiles = triton.cdiv(longest, constants["ROWS"])
        launch(_attend, (num_segments * num_heads * num_tiles,))(
            *(query, key, value, out, queries.starts, keys.starts, num_heads, num_tiles),
            *(query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
            *(value.stride(0), value.stride(1), scale * LOG2_E),
            **constants,
        )
    return out


@cache
def _constants(dim: int, element_size: int) -> dict[str, Any]:
    padded = max(64, triton.next_power_of_2(dim))
    rows, keys, warps, stages = TILES[element_size, padded]
    return {
        "ROWS": rows,
        "KEYS": keys,
        "DIM": dim,
        "PADDED": padded,
        # Triton would round fp32 operands to tf32 otherwise.
        "PRECISION": "ieee" if element_size == 4 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
        **launch_options(),
    }


@triton.jit(
    do_not_specialize=["num_heads", "num_tiles"],
    do_not_specialize_on_alignment=["query_starts", "key_starts"],
)
def _attend(
    query,
    key,
    value,
    out,
    query_starts,
    key_starts,
    num_heads,
    num_tiles,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    scale_log2,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of a segment are next to each other, so that they find its keys in the cache."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    head = (program // num_tiles % num_heads).to(tl.int64)
    segment = program // num_tiles // num_heads
    first_query = tl.load(query_starts + segment)
    num_queries = tl.load(query_starts + segment + 1) - first_query
    first_row = program % num_tiles * ROWS
    if first_row >= num_queries:
        return
    first_key = tl.load(key_starts + segment)
    num_keys = tl.load(key_starts + segment + 1) - first_key
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    there = (row < num_queries)[:, None] & (column < DIM)[None, :]
    token = (first_query + row).to(tl.int64)[:, None]
    heads = query + token * query_stride + head * query_head_stride + column[None, :]
    queries = tl.load(heads, mask=there, other=0.0)
    keys = key + first_key.to(tl.int64) * key_stride + head * key_head_stride
    values = value + first_key.to(tl.int64) * value_stride + head * value_head_stride

    acc = tl.zeros([ROWS, PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    num_full = num_keys // KEYS * KEYS
    acc, top, total = _attend_to_keys(
        acc,
        top,
        total,
        queries,
        keys,
        values,
        key_stride,
        value_stride,
        0,
        num_full,
        num_keys,
        scale_log2,
        KEYS,
        DIM,
        PADDED,
        PRECISION,
        False,
    )
    acc, top, total = _attend_to_keys(
        acc,
        top,
        total,
        queries,
        keys,
        values,
        key_stride,
        value_stride,
        num_full,
        num_keys,
        num_keys,
        scale_log2,
        KEYS,
        DIM,
        PADDED,
        PRECISION,
        True,
    )
    mixed = (acc / total[:, None]).to(out.dtype.element_ty)
    line = (token * num_heads + head) * DIM
    tl.store(out + line + column[None, :], mixed, mask=there)


@triton.jit
def _attend_to_keys(
    acc,
    top,
    total,
    queries,
    keys,
    values,
    key_stride,
    value_stride,
    first,
    stop,
    num_keys,
    scale_log2,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds keys first:stop, a tile at a time, to the running softmax of the rows.

    MASKED: the tile is the last one, which may reach past `num_keys`.
    """
    column = tl.arange(0, PADDED)[None, :]
    for start in tl.range(first, stop, KEYS):
        index = start + tl.arange(0, KEYS)
        line = index.to(tl.int64)[:, None]
        key_places = keys + line * key_stride + column
        value_places = values + line * value_stride + column
        if MASKED or DIM != PADDED:
            there = (index < num_keys)[:, None] & (column < DIM)
            some_keys = tl.load(key_places, mask=there, other=0.0)
            some_values = tl.load(value_places, mask=there, other=0.0)
        else:
            some_keys = tl.load(key_places)
            some_values = tl.load(value_places)
        scores = tl.dot(queries, tl.trans(some_keys), input_precision=PRECISION) * scale_log2
        if MASKED:
            scores = tl.where((index < num_keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # of every tile some key is seen
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(some_values.dtype),
            some_values,
            acc * shrink[:, None],
            input_precision=PRECISION,
        )
        top = new_top
    return acc, top, total
