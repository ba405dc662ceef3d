"""Attention of a step's queries over the paged KV cache, for any mix of chunk lengths.

Owns the one op that serves prefill chunks and decodes alike, `AttentionKind`, which says who sees
what, and `AttentionBatch`, which says where each sequence's queries and blocks are. Does not know
requests, nor how blocks were allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Case, Op
from octavo.kernels.native import support
from octavo.kernels.triton_support import needs_hopper
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

NATIVE_BLOCK_SIZE = 16
NATIVE_MAX_GROUP = 96  # query heads on one kv head
TRITON_MAX_DIM = 256
HOPPER_DIMS = (64, 128)
HOPPER_MAX_GROUP = 64
HOPPER_LEAST_BLOCK_SIZE = 8


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What a layer's attention is beyond plain causal attention. Fixed when a layer is built.

    Args:
        window: tokens that a query sees, its own the last of them (arXiv 2310.06825, section 2);
            None: all up to its own. Blocks before every window of a step are not read: neither
            their contents nor their entries in the block table need mean anything.
        softcap: scores become softcap * tanh(score / softcap) (arXiv 2408.00118, section 2).
        causal: False: a query sees the whole context, later tokens too. Only right where all
            tokens of a sequence run in one step, as an encoder's do.
    """

    window: int | None = None
    softcap: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError("a window is of one token at least, and of causal attention")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"a softcap is above 0, not {self.softcap}")

    def sizes(self) -> dict[str, int]:
        """Of a `Case`; plain attention has none."""
        sizes = {
            "window": self.window or 0,
            "softcap": int(self.softcap is not None),
            "bidirectional": int(not self.causal),
        }
        return {name: size for name, size in sizes.items() if size}


PLAIN = AttentionKind()


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences packed one after the other along the token dimension of the queries."""

    query_starts: Tensor  # [B+1] int32: sequence b owns queries query_starts[b]:query_starts[b+1]
    context_lens: Tensor  # [B] int32: tokens in the cache, those of this step included
    block_tables: Tensor  # [B, W] int32: the cache blocks of each sequence, in order
    max_query_len: int
    max_context_len: int

    def __post_init__(self) -> None:
        starts, lengths, tables = self.query_starts, self.context_lens, self.block_tables
        num_sequences = lengths.shape[0]
        if (
            not starts.dtype == lengths.dtype == tables.dtype == torch.int32
            or (starts.shape[0], tables.shape[0]) != (num_sequences + 1, num_sequences)
            or not (starts.is_contiguous() and lengths.is_contiguous() and tables.is_contiguous())
        ):
            rule = "starts [B+1], lengths [B] and tables [B, W] are contiguous int32"
            raise support.refuse("attention", rule, starts=starts, lengths=lengths, tables=tables)


class PagedAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        kv_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        kind: AttentionKind = PLAIN,
    ) -> Tensor:
        """query [T, Hq, D] (strided view allowed) -> [T, Hq, D], contiguous.

        kv_cache [2, num_blocks, Hkv, block_size, D] in the query's dtype, with this step's keys and
        values already written; Hq is a multiple of Hkv. Query i of a chunk of n sees the context
        positions up to and including context_len - n + i, but for what `kind` says; `kind` is the
        one whose `sizes` were in the case. Scores, softcap and softmax are in fp32.
        """
        ...


def reference_paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    num_queries_total, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    starts = batch.query_starts.tolist()
    out = query.new_empty(num_queries_total, num_heads, head_dim)
    for b, context_len in enumerate(batch.context_lens.tolist()):
        num_queries = starts[b + 1] - starts[b]
        if num_queries == 0:
            continue
        last_visible = torch.arange(context_len - num_queries, context_len, device=query.device)
        if not kind.causal:
            last_visible[:] = context_len - 1
        unseen = 0  # tokens of blocks before every window
        if kind.window is not None:
            unseen = max(0, context_len - num_queries - kind.window + 1) // block_size * block_size
        blocks = batch.block_tables[b, unseen // block_size : -(-context_len // block_size)].long()
        keys, values = (
            # [blocks, Hkv, block_size, D] -> [Hkv, 1, seen context, D]
            pages[blocks].transpose(0, 1).flatten(1, 2)[:, None, : context_len - unseen].float()
            for pages in kv_cache
        )
        queries = query[starts[b] : starts[b + 1]].float()
        queries = queries.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = queries @ keys.transpose(-1, -2) * scale  # [Hkv, group, queries, seen context]
        if kind.softcap is not None:
            scores.div_(kind.softcap).tanh_().mul_(kind.softcap)
        position = torch.arange(unseen, context_len, device=query.device)
        scores.masked_fill_(position > last_visible[:, None], float("-inf"))
        if kind.window is not None:
            scores.masked_fill_(position <= last_visible[:, None] - kind.window, float("-inf"))
        mixed = scores.softmax(-1) @ values  # [Hkv, group, queries, D]
        out[starts[b] : starts[b + 1]] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out


def native_paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """As PagedAttention, for blocks of 16 tokens and the head sizes of `_unsupported`."""
    tokens, num_heads, dim = query.shape
    halves, num_blocks, num_kv_heads, block_size, cache_dim = kv_cache.shape
    num_sequences, table_width = batch.block_tables.shape
    if (halves, block_size, cache_dim) != (2, NATIVE_BLOCK_SIZE, dim) or dim % 16 or dim > 256:
        rule = "kv_cache is [2, blocks, Hkv, 16, D], D a multiple of 16 up to 256"
        raise support.refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    if num_heads % num_kv_heads or num_heads > NATIVE_MAX_GROUP * num_kv_heads:
        rule = f"Hq is a multiple of Hkv, at most {NATIVE_MAX_GROUP} times it"
        raise support.refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    token_stride, head_stride, dense = query.stride()
    if dense != 1 or not kv_cache.is_contiguous() or query.dtype is not kv_cache.dtype:
        rule = "dense heads, a contiguous cache, one dtype"
        raise support.refuse("paged_attention", rule, query=query, kv_cache=kv_cache)
    out = query.new_empty(tokens, num_heads, dim)
    native.library().paged_attention[query.dtype](
        *(query.data_ptr(), token_stride, head_stride, kv_cache.data_ptr()),
        *(batch.query_starts.data_ptr(), batch.context_lens.data_ptr()),
        *(batch.block_tables.data_ptr(), out.data_ptr()),
        *(num_sequences, table_width, num_blocks, num_heads, num_kv_heads, dim),
        *(scale, kind.window or 0, kind.softcap or 0.0, kind.causal, torch.get_num_threads()),
    )
    return out


def _unsupported(case: Case) -> str | None:
    dim, block_size = case.sizes.get("head_dim", 0), case.sizes.get("block_size", NATIVE_BLOCK_SIZE)
    if dim % 16 or dim > 256:
        return f"made for head sizes that are multiples of 16 up to 256, not {dim}"
    if block_size != NATIVE_BLOCK_SIZE:
        return f"made for blocks of {NATIVE_BLOCK_SIZE} tokens, not {block_size}"
    if case.sizes.get("num_heads", 1) > NATIVE_MAX_GROUP * case.sizes.get("num_kv_heads", 1):
        return f"made for at most {NATIVE_MAX_GROUP} query heads on one kv head"
    return support.unsupported(case)


def _unsupported_by_triton(case: Case) -> str | None:
    dim = case.sizes.get("head_dim", 0)
    if dim > TRITON_MAX_DIM:
        return f"made for head sizes up to {TRITON_MAX_DIM}, not {dim}"
    return unsupported_by_triton(case)


def _unsupported_by_hopper(case: Case) -> str | None:
    sizes = case.sizes
    if not sizes.keys().isdisjoint(("window", "softcap", "bidirectional")):
        return "made for causal attention to all tokens before, without a softcap"
    block_size, dim = sizes.get("block_size", NATIVE_BLOCK_SIZE), sizes.get("head_dim", 0)
    group = sizes.get("num_heads", 1) // sizes.get("num_kv_heads", 1)
    if case.dtype.itemsize != 2 or dim not in HOPPER_DIMS:
        return f"made for 16-bit values and heads of {HOPPER_DIMS[0]} or {HOPPER_DIMS[1]}"
    if group & (group - 1) or group > HOPPER_MAX_GROUP:
        return f"made for a power of two of heads on one kv head, up to {HOPPER_MAX_GROUP}"
    if block_size & (block_size - 1) or block_size < HOPPER_LEAST_BLOCK_SIZE:
        return f"made for blocks of a power of two, from {HOPPER_LEAST_BLOCK_SIZE} tokens on"
    return needs_hopper(case) or unsupported_by_triton(case)


def _unsupported_by_invariant(case: Case) -> str | None:
    if not case.sizes.get("batch_invariant"):
        return "batch invariance was not asked for"
    return _unsupported_by_triton(case)


PAGED_ATTENTION: Op[PagedAttention] = Op("paged_attention", reference_paged_attention)
PAGED_ATTENTION.register("native", native_paged_attention, _unsupported)
PAGED_ATTENTION.register_module(
    "triton-invariant",
    "octavo.kernels.triton_paged_attention:triton_invariant_paged_attention",
    _unsupported_by_invariant,
)
PAGED_ATTENTION.register_module(
    "hopper",
    "octavo.kernels.hopper_prompt_attention:hopper_paged_attention",
    _unsupported_by_hopper,
)
PAGED_ATTENTION.register_module(
    "triton",
    "octavo.kernels.triton_paged_attention:triton_paged_attention",
    _unsupported_by_triton,
)
