"""Rotary embedding and the cache write in one pass over the fused qkv tensor.

Owns the fused op and the compiled launcher that `rotary` and `kv_write` share: each of them is half
of it. Does not know attention.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Op
from octavo.kernels.kv_write import KV_WRITE, reference_kv_write
from octavo.kernels.native.support import refuse, unsupported
from octavo.kernels.rotary import ROTARY, reference_rotary


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
        """`rotary(query, key, ...)`, then `kv_write(key, value, ...)`: see those for the shapes."""
        ...


def reference_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
) -> None:
    reference_rotary(query, key, positions, cos_sin)
    reference_kv_write(key, value, kv_cache, slots)


def _angle_pointers(op: str, query: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[int, int]:
    tokens, _, dim = query.shape
    if (
        cos_sin.dtype is not torch.float32
        or cos_sin.shape[1] != dim
        or dim % 2
        or positions.dtype is not torch.int64
        or positions.shape != (tokens,)
        or not (positions.is_contiguous() and cos_sin.is_contiguous())
    ):
        rule = "positions is [T] int64, cos_sin [positions, D] fp32, D even, both contiguous"
        raise refuse(op, rule, query=query, positions=positions, cos_sin=cos_sin)
    return positions.data_ptr(), cos_sin.data_ptr()


def _cache_fields(
    op: str, key: Tensor, kv_cache: Tensor, slots: Tensor
) -> tuple[int, int, int, int]:
    tokens, num_kv_heads, dim = key.shape
    halves, num_blocks, cache_heads, block_size, cache_dim = kv_cache.shape
    if (
        (halves, cache_heads, cache_dim) != (2, num_kv_heads, dim)
        or kv_cache.dtype is not key.dtype
        or slots.dtype is not torch.int64
        or slots.shape != (tokens,)
        or not (kv_cache.is_contiguous() and slots.is_contiguous())
    ):
        rule = "kv_cache is [2, blocks, Hkv, block_size, D] like key, slots [T] int64, contiguous"
        raise refuse(op, rule, key=key, kv_cache=kv_cache, slots=slots)
    return kv_cache.data_ptr(), num_blocks, block_size, slots.data_ptr()


def _head_fields(op: str, like: Tensor, heads: Tensor) -> tuple[int, int, int, int]:
    tokens, num_heads, dim = heads.shape
    token_stride, head_stride, dense = heads.stride()
    if dense != 1 or heads.dtype is not like.dtype or like.shape[::2] != (tokens, dim):
        rule = "query, key and value are [T, heads, D] of one dtype with dense heads"
        raise refuse(op, rule, like=like, heads=heads)
    return heads.data_ptr(), token_stride, head_stride, num_heads


def native_rotary(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """As Rotary."""
    native.library().rotary_kv_write[query.dtype](
        *_head_fields("rotary", query, query),
        *_head_fields("rotary", query, key),
        *(0, 0, 0, 0),
        *_angle_pointers("rotary", query, positions, cos_sin),
        *(0, 0, 1, 0),
        *(query.shape[0], query.shape[2], torch.get_num_threads()),
    )


def native_kv_write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """As KvWrite."""
    if value.shape != key.shape:
        raise refuse("kv_write", "key and value have one shape", key=key, value=value)
    native.library().rotary_kv_write[key.dtype](
        *(0, 0, 0, 0),
        *_head_fields("kv_write", key, key),
        *_head_fields("kv_write", key, value),
        *(0, 0),
        *_cache_fields("kv_write", key, kv_cache, slots),
        *(key.shape[0], key.shape[2], torch.get_num_threads()),
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
    if value.shape != key.shape:
        raise refuse(op, "key and value have one shape", key=key, value=value)
    native.library().rotary_kv_write[query.dtype](
        *_head_fields(op, query, query),
        *_head_fields(op, query, key),
        *_head_fields(op, query, value),
        *_angle_pointers(op, query, positions, cos_sin),
        *_cache_fields(op, key, kv_cache, slots),
        *(query.shape[0], query.shape[2], torch.get_num_threads()),
    )


ROTARY_KV_WRITE: Op[RotaryKvWrite] = Op("rotary_kv_write", reference_rotary_kv_write)
ROTARY_KV_WRITE.register("native", native_rotary_kv_write, unsupported)
ROTARY.register("native", native_rotary, unsupported)
KV_WRITE.register("native", native_kv_write, unsupported)
