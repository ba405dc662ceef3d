"""Attention over compressed latents: all query heads on one key, which holds its own value.

Owns two ops: the write of a step's latents into the paged cache, with its rotation, and the
attention over them (arXiv 2405.04434, section 2.1, with the projections of keys and values absorbed
into queries and outputs). Does not know these projections.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import triton_support
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.paged_attention import AttentionBatch
from octavo.kernels.rotary_kv_write import reference_rotary


class LatentKvWrite(Protocol):
    def __call__(
        self,
        query: Tensor,
        latent: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
    ) -> None:
        """Rotates query [T, Hq, R] in place, and writes latent [T, C] and the rotated key [T, R].

        All may be strided views; what `key` holds afterwards is not said. They become rows
        [latent, key] of kv_cache [1, blocks, 1, block_size, C + R]. positions, cos_sin and slots
        are as of `RotaryKvWrite`.
        """
        ...


class LatentAttention(Protocol):
    def __call__(
        self, query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        """query [T, Hq, C + R] -> [T, Hq, C]: the latents, weighted. C is `rank`.

        Scores are of the whole rows of kv_cache [1, blocks, 1, block_size, C + R]. Who sees what is
        as of `PagedAttention`. Scores and softmax are in fp32.
        """
        ...


def reference_latent_kv_write(
    query: Tensor,
    latent: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
) -> None:
    reference_rotary(query, positions, cos_sin)
    reference_rotary(key[:, None], positions, cos_sin)
    block_size, rank = kv_cache.shape[3], latent.shape[1]
    blocks, rows = slots // block_size, slots % block_size
    kv_cache[0, blocks, 0, rows, :rank] = latent
    kv_cache[0, blocks, 0, rows, rank:] = key


def reference_latent_attention(
    query: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, rank: int
) -> Tensor:
    starts = batch.query_starts.tolist()
    out = query.new_empty(*query.shape[:2], rank)
    for b, context_len in enumerate(batch.context_lens.tolist()):
        mine = slice(starts[b], starts[b + 1])
        num_queries = starts[b + 1] - starts[b]
        if num_queries == 0:
            continue
        blocks = batch.block_tables[b, : -(-context_len // kv_cache.shape[3])].long()
        rows = kv_cache[0, blocks, 0].flatten(0, 1)[:context_len].float()
        scores = query[mine].transpose(0, 1).float() @ rows.T * scale  # [Hq, queries, context]
        position = torch.arange(context_len, device=query.device)
        last_visible = position[context_len - num_queries :, None]
        scores.masked_fill_(position > last_visible, float("-inf"))
        out[mine] = (scores.softmax(-1) @ rows[:, :rank]).transpose(0, 1).to(query.dtype)
    return out


MOST_RANK = 512  # what a program of Triton's has room for, for all of its heads


def _unsupported_by_triton(case: Case) -> str | None:
    if (rank := case.sizes.get("kv_lora_rank", 0)) > MOST_RANK:
        return f"made for latents of at most {MOST_RANK} numbers, not {rank}"
    return triton_support.unsupported(case)


LATENT_KV_WRITE: Op[LatentKvWrite] = Op("latent_kv_write", reference_latent_kv_write)
LATENT_ATTENTION: Op[LatentAttention] = Op("latent_attention", reference_latent_attention)
LATENT_ATTENTION.register_module(
    "triton",
    "octavo.kernels.triton_latent_attention:triton_latent_attention",
    _unsupported_by_triton,
)
