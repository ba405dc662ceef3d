"""Attention over compressed latents in Triton: a program for a token and some of its heads.

Owns the kernel and its launch. A program reads every row of its token's context once, for all of
its heads: the row is key and value. Nothing is read by the host, so a CUDA graph can hold it. The
context is read in one order, from its first token to its last, so a token's bits depend on nothing
else in the batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.paged_attention import AttentionBatch
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

HEADS = 16  # of a program: the fewest that a matrix instruction takes
LEAST_DEPTH = 16  # of one


def triton_latent_attention(
    query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, rank: int
) -> Tensor:
    """As LatentAttention; heads of the query are dense."""
    num_tokens, num_heads, width = query.shape
    parts, _, kv_heads, block_size, cache_width = kv_cache.shape
    if (
        (parts, kv_heads, cache_width) != (1, 1, width)
        or not 0 < rank < width
        or query.stride(2) != 1
        or kv_cache.dtype is not query.dtype
        or not kv_cache.is_contiguous()
    ):
        rule = "query is [T, Hq, D] with dense heads, kv_cache [1, blocks, 1, block_size, D]"
        raise refuse("latent_attention", rule, query=query, kv_cache=kv_cache)
    out = query.new_empty(num_tokens, num_heads, rank)
    num_sequences, table_width = batch.block_tables.shape
    if num_tokens:
        launch(_latent_attention, (num_tokens, triton.cdiv(num_heads, HEADS)))(
            *(query, kv_cache, batch.query_starts, batch.context_lens, batch.block_tables, out),
            *(query.stride(0), query.stride(1), num_heads, table_width, num_sequences, scale),
            STARTS=triton.next_power_of_2(num_sequences + 1),
            **_constants(rank, width, block_size, query.dtype),
        )
    return out


@cache
def _constants(rank: int, width: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RANK": rank,
        "PADDED_RANK": max(LEAST_DEPTH, triton.next_power_of_2(rank)),
        "TURNED": width - rank,
        "PADDED_TURNED": max(LEAST_DEPTH, triton.next_power_of_2(width - rank)),
        "BLOCK_SIZE": block_size,
        "HEADS": HEADS,
        "ROWS": 16 if dtype is torch.float32 else 32,
        "num_warps": 8,
        "num_stages": 2,
        **launch_options(),
    }


@triton.jit(do_not_specialize=["num_sequences"])
def _latent_attention(
    query,
    kv_cache,
    query_starts,
    context_lens,
    block_tables,
    out,
    token_stride,
    head_stride,
    num_heads,
    table_width,
    num_sequences,
    scale,
    STARTS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    TURNED: tl.constexpr,
    PADDED_TURNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c = tl.arange(0, PADDED_RANK)
    r = tl.arange(0, PADDED_TURNED)
    is_head = (head < num_heads)[:, None]
    of_latent = (c < RANK)[None, :]
    of_turned = (r < TURNED)[None, :]
    # The last sequence that starts at the token or before it; a token of none sees nothing.
    start = tl.arange(0, STARTS)
    starts = tl.load(query_starts + start, mask=start <= num_sequences, other=2147483647)
    found = tl.sum((starts <= token).to(tl.int32), 0) - 1
    sequence = tl.minimum(found, num_sequences - 1)
    num_after = tl.load(query_starts + sequence + 1) - token - 1
    num_seen = tl.load(context_lens + sequence) - num_after
    num_seen = tl.where(found < num_sequences, num_seen, 0)
    table = block_tables + sequence.to(tl.int64) * table_width
    heads = query + token.to(tl.int64) * token_stride + head[:, None].to(tl.int64) * head_stride
    latent_query = tl.load(heads + c[None, :], mask=is_head & of_latent, other=0.0)
    turned_query = tl.load(heads + RANK + r[None, :], mask=is_head & of_turned, other=0.0)

    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, PADDED_RANK], tl.float32)
    for first in range(0, num_seen, ROWS):
        position = first + tl.arange(0, ROWS)
        seen = position < num_seen
        block = tl.load(table + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * (RANK + TURNED)
        rows = kv_cache + row
        latent = tl.load(rows + c[None, :], mask=seen[:, None] & of_latent, other=0.0)
        turned = tl.load(rows + RANK + r[None, :], mask=seen[:, None] & of_turned, other=0.0)
        scores = tl.dot(latent_query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned_query, tl.trans(turned), scores, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrunk = tl.exp(highest - new_highest)
        powers = tl.exp(scores - new_highest[:, None])
        total = total * shrunk + tl.sum(powers, 1)
        weighted = tl.dot(powers.to(latent.dtype), latent, input_precision="ieee")
        sums = sums * shrunk[:, None] + weighted
        highest = new_highest
    sums = sums / tl.maximum(total, 1e-30)[:, None]
    place = out + (token.to(tl.int64) * num_heads + head[:, None]) * RANK + c[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_head & of_latent)
