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


def _check_heads(op: str, **tensors: Tensor) -> None:
    shapes = [t.shape for t in tensors.values()]
    dtypes = {t.dtype for t in tensors.values()}
    if (
        len(dtypes) > 1
        or any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes)
        or any(shape[2] != shapes[0][2] for shape in shapes)
        or any(t.stride(2) != 1 for t in tensors.values())
    ):
        raise refuse(op, "all are [T, heads, D] of one dtype with dense heads", **tensors)


def _check_angles(op: str, query: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    tokens, _, dim = query.shape
    if cos_sin.dtype is not torch.float32 or cos_sin.shape[1] != dim or dim % 2:
        raise refuse(op, "cos_sin is [positions, D] fp32, D even", query=query, cos_sin=cos_sin)
    if positions.dtype is not torch.int64 or positions.shape != (tokens,):
        raise refuse(op, "positions is [T] int64", query=query, positions=positions)
    if not (positions.is_contiguous() and cos_sin.is_contiguous()):
        raise refuse(op, "positions and cos_sin are contiguous", p=positions, cos_sin=cos_sin)


def _check_cache(op: str, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    tokens, heads, dim = key.shape
    if value.shape != key.shape:
        raise refuse(op, "key and value have one shape", key=key, value=value)
    if (
        kv_cache.dim() != 5
        or kv_cache.shape[2] != heads
        or kv_cache.shape[4] != dim
        or kv_cache.dtype is not key.dtype
        or not kv_cache.is_contiguous()
    ):
        raise refuse(op, "kv_cache is [2, blocks, Hkv, 16, D] like key", key=key, cache=kv_cache)
    if slots.dtype is not torch.int64 or slots.shape != (tokens,) or not slots.is_contiguous():
        raise refuse(op, "slots is [T] int64", key=key, slots=slots)


def native_rotary(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """As Rotary."""
    _check_heads("rotary", query=query, key=key)
    _check_angles("rotary", query, positions, cos_sin)
    tokens, num_heads, dim = query.shape
    native.library().rotary_kv_write[query.dtype](
        *(query.data_ptr(), query.stride(0), query.stride(1), num_heads),
        *(key.data_ptr(), key.stride(0), key.stride(1), key.shape[1]),
        *(0, 0, 0, key.shape[1]),
        *(positions.data_ptr(), cos_sin.data_ptr()),
        *(0, 0, 1, 0),
        *(tokens, dim, torch.get_num_threads()),
    )


def native_kv_write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """As KvWrite."""
    _check_heads("kv_write", key=key, value=value)
    _check_cache("kv_write", key, value, kv_cache, slots)
    tokens, num_kv_heads, dim = key.shape
    native.library().rotary_kv_write[key.dtype](
        *(0, 0, 0, 0),
        *(key.data_ptr(), key.stride(0), key.stride(1), key.shape[1]),
        *(value.data_ptr(), value.stride(0), value.stride(1), num_kv_heads),
        *(0, 0),
        *(kv_cache.data_ptr(), kv_cache.shape[1], kv_cache.shape[3], slots.data_ptr()),
        *(tokens, dim, torch.get_num_threads()),
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
    _check_heads("rotary_kv_write", query=query, key=key, value=value)
    _check_angles("rotary_kv_write", query, positions, cos_sin)
    _check_cache("rotary_kv_write", key, value, kv_cache, slots)
    tokens, num_heads, dim = query.shape
    native.library().rotary_kv_write[query.dtype](
        *(query.data_ptr(), query.stride(0), query.stride(1), num_heads),
        *(key.data_ptr(), key.stride(0), key.stride(1), key.shape[1]),
        *(value.data_ptr(), value.stride(0), value.stride(1), key.shape[1]),
        *(positions.data_ptr(), cos_sin.data_ptr()),
        *(kv_cache.data_ptr(), kv_cache.shape[1], kv_cache.shape[3], slots.data_ptr()),
        *(tokens, dim, torch.get_num_threads()),
    )


ROTARY_KV_WRITE: Op[RotaryKvWrite] = Op("rotary_kv_write", reference_rotary_kv_write)
ROTARY_KV_WRITE.register("native", native_rotary_kv_write, unsupported)
ROTARY.register("native", native_rotary, unsupported)
KV_WRITE.register("native", native_kv_write, unsupported)
