"""Causal attention of a step's queries over the paged KV cache, for any mix of chunk lengths.

Owns the one op that serves prefill chunks and decodes alike, and `AttentionBatch`, which says where
each sequence's queries and blocks are. Does not know requests, nor how blocks were allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.dispatch import Op


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences packed one after the other along the token dimension of the queries."""

    query_starts: Tensor  # [B+1] int32: sequence b owns queries query_starts[b]:query_starts[b+1]
    context_lens: Tensor  # [B] int32: tokens in the cache, those of this step included
    block_tables: Tensor  # [B, W] int32: the cache blocks of each sequence, in order
    max_query_len: int
    max_context_len: int


class PagedAttention(Protocol):
    def __call__(
        self, query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """query [T, Hq, D] (strided view allowed) -> [T, Hq, D], contiguous.

        kv_cache [2, num_blocks, Hkv, block_size, D] in the query's dtype, with this step's keys and
        values already written; Hq is a multiple of Hkv. Query i of a chunk of n sees the context
        positions up to and including context_len - n + i. Softmax is taken in fp32.
        """
        ...


def reference_paged_attention(
    query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    num_queries_total, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    starts = batch.query_starts.tolist()
    out = query.new_empty(num_queries_total, num_heads, head_dim)
    for b, context_len in enumerate(batch.context_lens.tolist()):
        num_queries = starts[b + 1] - starts[b]
        if num_queries == 0:
            continue
        blocks = batch.block_tables[b, : -(-context_len // block_size)].long()
        keys, values = (
            # [blocks, Hkv, block_size, D] -> [Hkv, 1, context, D]
            pages[blocks].transpose(0, 1).flatten(1, 2)[:, None, :context_len].float()
            for pages in kv_cache
        )
        queries = query[starts[b] : starts[b + 1]].float()
        queries = queries.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = queries @ keys.transpose(-1, -2) * scale  # [Hkv, group, queries, context]
        last_visible = torch.arange(context_len - num_queries, context_len, device=query.device)
        position = torch.arange(context_len, device=query.device)
        scores.masked_fill_(position > last_visible[:, None], float("-inf"))
        mixed = scores.softmax(-1) @ values  # [Hkv, group, queries, D]
        out[starts[b] : starts[b + 1]] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out


PAGED_ATTENTION: Op[PagedAttention] = Op("paged_attention", reference_paged_attention)
