"""Rotation, cache write and, for models that have it, QK-norm, in one Triton kernel.

Owns the launchers of `kv_write`, `rotary_kv_write` and `qk_norm_rotary_kv_write`, which differ in
what one program does to a few heads of one token. Does not know attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

VALUES_AT_ONCE = 1024  # of a head times heads, for one program


def triton_kv_write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """As KvWrite."""
    _check_write("kv_write", key, value, kv_cache, slots)
    # The kernel reads none of the tensors that stand in for those of a rotation.
    sizes = (0, key.shape[1], key.shape[2], kv_cache.shape[3], 0, False)
    _launch(key, key, value, slots, kv_cache, kv_cache, slots, *(kv_cache, kv_cache, 0.0), sizes)


def triton_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
) -> None:
    """As RotaryKvWrite."""
    _check_rotation("rotary_kv_write", query, key, positions, cos_sin)
    _check_write("rotary_kv_write", key, value, kv_cache, slots)
    sizes = (query.shape[1], *key.shape[1:], kv_cache.shape[3], cos_sin.shape[1], False)
    norms = (kv_cache, kv_cache, 0.0)
    _launch(query, key, value, positions, cos_sin, kv_cache, slots, *norms, sizes)


def triton_qk_norm_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
) -> None:
    """As QkNormRotaryKvWrite."""
    op = "qk_norm_rotary_kv_write"
    _check_rotation(op, query, key, positions, cos_sin)
    if cos_sin.shape[1] != key.shape[2]:
        raise refuse(op, "a head turns as a whole", key=key, cos_sin=cos_sin)
    _check_write(op, key, value, kv_cache, slots)
    for weight in (query_weight, key_weight):
        if (
            weight.shape != key.shape[2:]
            or weight.dtype not in (key.dtype, torch.float32)
            or weight.dtype is not query_weight.dtype
            or not weight.is_contiguous()
        ):
            rule = "weights are [D], both in the heads' dtype or in fp32, dense"
            raise refuse(op, rule, key=key, weight=weight)
    sizes = (query.shape[1], *key.shape[1:], kv_cache.shape[3], cos_sin.shape[1], True)
    norms = (query_weight, key_weight, eps)
    _launch(query, key, value, positions, cos_sin, kv_cache, slots, *norms, sizes)


def _check_rotation(
    op: str, query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor
) -> None:
    tokens, _, dim = query.shape
    if query.stride(2) != 1 or query.dtype is not key.dtype or key.shape[::2] != (tokens, dim):
        rule = "query, key and value are [T, heads, D] of one dtype with dense heads"
        raise refuse(op, rule, query=query, key=key)
    if (
        cos_sin.dtype is not torch.float32
        or cos_sin.shape[1] > dim
        or cos_sin.shape[1] % 2
        or positions.dtype is not torch.int64
        or positions.shape != (tokens,)
        or not (positions.is_contiguous() and cos_sin.is_contiguous())
    ):
        rule = "positions is [T] int64, cos_sin [positions, R <= D] fp32, R even, both contiguous"
        raise refuse(op, rule, query=query, positions=positions, cos_sin=cos_sin)


def _check_write(op: str, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    tokens, num_kv_heads, dim = key.shape
    halves, _, cache_heads, _, cache_dim = kv_cache.shape
    if value.dtype is not key.dtype or (key.stride(2), value.stride(2)) != (1, 1):
        rule = "query, key and value are [T, heads, D] of one dtype with dense heads"
        raise refuse(op, rule, key=key, value=value)
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


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    sizes: tuple[int, int, int, int, int, bool],
) -> None:
    """Of checked tensors; `sizes` are the arguments of `_constants`."""
    tokens = key.shape[0]
    if tokens == 0:
        return
    programs, constants = _constants(*sizes)
    launch(_rotary_kv_write, (tokens, programs))(
        *(query, key, value, positions, cos_sin, kv_cache, slots, query_weight, key_weight, eps),
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        kv_cache.stride(0),
        **constants,
    )


@cache
def _constants(
    num_heads: int, num_kv_heads: int, dim: int, block_size: int, rotary_dim: int, norms: bool
) -> tuple[int, dict[str, Any]]:
    """(programs for a token, keywords of the launch)"""
    half = triton.next_power_of_2(max(1, triton.cdiv(dim, 2)))
    at_once = max(1, VALUES_AT_ONCE // (2 * half))
    query_programs = triton.cdiv(num_heads, at_once)
    return query_programs + triton.cdiv(num_kv_heads, at_once), {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "DIM": dim,
        "HALF_PAD": half,
        "AT_ONCE": at_once,
        "QUERY_PROGRAMS": query_programs,
        "ROTARY_DIM": rotary_dim,
        "NORM": norms,
        "num_warps": 4,
        **launch_options(),
    }


@triton.jit
def _turned(
    heads,
    first_weight,
    second_weight,
    eps,
    cos,
    sin,
    there,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
):
    """Both halves of some heads at `heads` [n, 1], normed if asked, turned, rounded once."""
    column = tl.arange(0, HALF_PAD)[None, :]
    first = tl.load(heads + column, mask=there, other=0.0)
    second = tl.load(heads + ROTARY_DIM // 2 + column, mask=there, other=0.0)
    dtype = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(squares / DIM + eps)[:, None]
        # Rounded where RMS_NORM rounds: before a weight of the same dtype, not before a wider one.
        unit = (first * inverse).to(first_weight.dtype).to(tl.float32)
        first = (unit * first_weight.to(tl.float32)).to(dtype)
        unit = (second * inverse).to(second_weight.dtype).to(tl.float32)
        second = (unit * second_weight.to(tl.float32)).to(dtype)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotary_kv_write(
    query,
    key,
    value,
    positions,
    cos_sin,
    kv_cache,
    slots,
    query_weight,
    key_weight,
    eps,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    value_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A few query heads of one token, or a few kv heads of it."""
    allow_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    half = tl.arange(0, HALF_PAD)[None, :]
    inside = half < ROTARY_DIM // 2
    first_weight = 1.0
    second_weight = 1.0
    if NORM:  # no kernel writes the weights
        weight = key_weight
        if program < QUERY_PROGRAMS:
            weight = query_weight
        first_weight = tl.load(weight + half, mask=inside, other=0.0)
        second_weight = tl.load(weight + DIM // 2 + half, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    cos = 1.0
    sin = 0.0
    if ROTARY_DIM:
        angles = cos_sin + tl.load(positions + token) * ROTARY_DIM + half
        cos = tl.load(angles, mask=inside, other=0.0)
        sin = tl.load(angles + ROTARY_DIM // 2, mask=inside, other=0.0)
    if program < QUERY_PROGRAMS:
        head = (program * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
        there = (head < HEADS) & inside
        heads = query + token * query_token_stride + head * query_head_stride
        first, second = _turned(
            heads,
            first_weight,
            second_weight,
            eps,
            cos,
            sin,
            there,
            DIM,
            ROTARY_DIM,
            HALF_PAD,
            NORM,
        )
        tl.store(heads + half, first, mask=there)
        tl.store(heads + ROTARY_DIM // 2 + half, second, mask=there)
    else:
        head = ((program - QUERY_PROGRAMS) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
        slot = tl.load(slots + token)
        line = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        cached = kv_cache + line * DIM
        column = tl.arange(0, 2 * HALF_PAD)[None, :]
        whole = (head < KV_HEADS) & (column < DIM)
        values = value + token * value_token_stride + head * value_head_stride
        row = tl.load(values + column, mask=whole, other=0.0)
        tl.store(cached + value_offset + column, row, mask=whole)
        keys = key + token * key_token_stride + head * key_head_stride
        if ROTARY_DIM:
            there = (head < KV_HEADS) & inside
            first, second = _turned(
                keys,
                first_weight,
                second_weight,
                eps,
                cos,
                sin,
                there,
                DIM,
                ROTARY_DIM,
                HALF_PAD,
                NORM,
            )
            tl.store(cached + half, first, mask=there)
            tl.store(cached + ROTARY_DIM // 2 + half, second, mask=there)
        if ROTARY_DIM < DIM:
            rest = whole & (column >= ROTARY_DIM)
            tl.store(cached + column, tl.load(keys + column, mask=rest, other=0.0), mask=rest)
