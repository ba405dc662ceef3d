"""Rotary position embedding, in place, and the write of keys and values into the paged KV cache.

Owns the half-rotation ("NeoX") form, in which element i turns together with element i + R/2 (R
numbers of a head turn, mostly all D), and the compiled launcher that it shares with `kv_write`.
Does not know how the table of angles was made (plain, scaled, YaRN): that is the layer's. Does not
know attention.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Op
from octavo.kernels.kv_write import KV_WRITE, reference_kv_write
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


class RotaryKvWrite(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
    ) -> None:
        """Rotates query [T, Hq, D] in place, and writes the rotated key [T, Hkv, D] and value.

        What `key` holds afterwards is not said: who attends reads it in the cache. All three may be
        strided views into one fused qkv tensor. positions [T] int64 selects rows of cos_sin
        [max_positions, R] fp32: R/2 cosines, then R/2 sines. The first R <= D numbers of a head
        turn, the others stay as they are. For the rest see `KvWrite`.
        """
        ...


def reference_rotary(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates the first R numbers of heads [T, H, D] in place, in fp32, rounded once."""
    heads = heads[..., : cos_sin.shape[1]]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # each [T, 1, R/2]
    first, second = heads.float().chunk(2, dim=-1)  # each [T, H, R/2]
    # Both halves before either is written: in fp32 they are views of what is overwritten.
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    heads.copy_(turned)


def reference_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
) -> None:
    reference_rotary(query, positions, cos_sin)
    reference_rotary(key, positions, cos_sin)
    reference_kv_write(key, value, kv_cache, slots)


def _head_fields(op: str, like: Tensor, heads: Tensor) -> tuple[int, int, int, int]:
    tokens, num_heads, dim = heads.shape
    token_stride, head_stride, dense = heads.stride()
    if dense != 1 or heads.dtype is not like.dtype or like.shape[::2] != (tokens, dim):
        rule = "query, key and value are [T, heads, D] of one dtype with dense heads"
        raise refuse(op, rule, like=like, heads=heads)
    return heads.data_ptr(), token_stride, head_stride, num_heads


def _write_fields(
    op: str, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
) -> tuple[int, ...]:
    """From kv_cache to the last: the fields that both launchers have."""
    tokens, num_kv_heads, dim = key.shape
    halves, num_blocks, cache_heads, block_size, cache_dim = kv_cache.shape
    if (
        (halves, cache_heads, cache_dim) != (2, num_kv_heads, dim)
        or value.shape != key.shape
        or kv_cache.dtype is not key.dtype
        or slots.dtype is not torch.int64
        or slots.shape != (tokens,)
        or not (kv_cache.is_contiguous() and slots.is_contiguous())
    ):
        rule = (
            "value is like key, kv_cache [2, blocks, Hkv, block_size, D] in their dtype, "
            "slots [T] int64, contiguous"
        )
        raise refuse(op, rule, key=key, value=value, kv_cache=kv_cache, slots=slots)
    cache, threads = kv_cache.data_ptr(), torch.get_num_threads()
    return cache, num_blocks, block_size, slots.data_ptr(), tokens, dim, threads


def native_kv_write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """As KvWrite."""
    op = "kv_write"
    native.library().rotary_kv_write[key.dtype](
        *(0, 0, 0, 0),
        *_head_fields(op, key, key),
        *_head_fields(op, key, value),
        *(0, 0, 0),
        *_write_fields(op, key, value, kv_cache, slots),
    )


def native_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
) -> None:
    """As RotaryKvWrite."""
    op = "rotary_kv_write"
    tokens, _, dim = query.shape
    rotary_dim = cos_sin.shape[1]
    if (
        cos_sin.dtype is not torch.float32
        or rotary_dim > dim
        or rotary_dim % 2
        or positions.dtype is not torch.int64
        or positions.shape != (tokens,)
        or not (positions.is_contiguous() and cos_sin.is_contiguous())
    ):
        rule = "positions is [T] int64, cos_sin [positions, R <= D] fp32, R even, both contiguous"
        raise refuse(op, rule, query=query, positions=positions, cos_sin=cos_sin)
    native.library().rotary_kv_write[query.dtype](
        *_head_fields(op, query, query),
        *_head_fields(op, query, key),
        *_head_fields(op, query, value),
        *(positions.data_ptr(), cos_sin.data_ptr(), rotary_dim),
        *_write_fields(op, key, value, kv_cache, slots),
    )


ROTARY_KV_WRITE: Op[RotaryKvWrite] = Op("rotary_kv_write", reference_rotary_kv_write)
ROTARY_KV_WRITE.register("native", native_rotary_kv_write, unsupported)
KV_WRITE.register("native", native_kv_write, unsupported)
ROTARY_KV_WRITE.register_module(
    "triton",
    "octavo.kernels.triton_rotary_kv_write:triton_rotary_kv_write",
    unsupported_by_triton,
)
KV_WRITE.register_module(
    "triton", "octavo.kernels.triton_rotary_kv_write:triton_kv_write", unsupported_by_triton
)
