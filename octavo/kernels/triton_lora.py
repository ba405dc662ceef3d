"""LoRA in Triton: tokens sorted by adapter, then two products over tiles of one adapter's tokens.

x goes through A ("shrink") into fp32 sums, and those through B onto y ("expand"), as Punica (arXiv
2310.18547) and S-LoRA (2311.03285) do. Owns the kernels and their launch. Nothing is read by the
host, and every grid depends on the number of tokens only, so that a CUDA graph can hold it.

Where tokens are few, the sums of A are cut along the input features, else most of a GPU would idle;
they are added up in their order, so the same step gives the same bits. Where bits must not depend
on the batch, they are never cut: a token's sums are its own then, whatever its tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.config.lora import num_splits
from octavo.kernels.dispatch import Case
from octavo.kernels.lora import LoRAShape
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

TILE = 32  # tokens
MOST_PARTS = 3
OUTPUTS = 128  # of y, in one program of the second product
DEPTH_BYTES = 128  # of one row of A, in one step of the first product


@dataclass(frozen=True, slots=True)
class PlainSlots:
    """The adapters of one product, one after the other."""

    a: Tensor  # [slots, P * R, K]
    b: Tensor  # [slots, N, R]
    shape: LoRAShape
    invariant: bool  # bits must not depend on the batch


@dataclass(frozen=True, slots=True)
class Groups:
    """The tokens of a step by adapter.

    `order` [T] has all of them by slot, those without one first, and else as they stand. A column
    of `table` [3, tiles] is a tile: (slot, its first place in `order`, the one after its last).
    There are as many columns as there could be tiles; those past the last are empty.
    """

    order: Tensor
    table: Tensor


class TritonLoRA:
    """As `octavo.kernels.lora.LoRA`."""

    def allocate(self, shape: LoRAShape, case: Case) -> PlainSlots:
        if len(shape.parts) > MOST_PARTS:
            raise ValueError(f"lora: made for at most {MOST_PARTS} parts, not {len(shape.parts)}")
        like = torch.empty(0, dtype=case.dtype, device=case.device)
        a = like.new_zeros(shape.num_slots, len(shape.parts) * shape.rank, shape.in_features)
        b = like.new_zeros(shape.num_slots, shape.out_features, shape.rank)
        return PlainSlots(a, b, shape, bool(case.sizes.get("batch_invariant")))

    def place(self, slots: PlainSlots, slot: int, a: Tensor, b: Tensor) -> None:
        slots.shape.check_placed(a, b)
        slots.a[slot].copy_(a.flatten(0, 1))
        slots.b[slot].copy_(b)

    def group(self, adapters: Tensor, num_slots: int) -> Groups:
        return group_by_adapter(adapters, num_slots)

    def add(self, y: Tensor, x: Tensor, slots: PlainSlots, groups: Groups) -> None:
        num_tokens, shape = len(x), slots.shape
        if not num_tokens:
            return
        if x.shape[1] != shape.in_features or y.shape != (num_tokens, shape.out_features):
            rule = f"x is [T, {shape.in_features}] and y [T, {shape.out_features}]"
            raise refuse("lora", rule, x=x, y=y)
        dense = x.stride(1) == 1 and y.is_contiguous() and x.dtype is y.dtype is slots.a.dtype
        if not dense or groups.order.shape != (num_tokens,):
            rule = f"x with dense rows, y contiguous, {slots.a.dtype}, for the tokens of a group"
            raise refuse("lora", rule, x=x, y=y, order=groups.order)
        splits = num_splits(num_tokens, shape.in_features, invariant=slots.invariant)
        shrunk = torch.empty(
            splits, num_tokens, slots.a.shape[1], dtype=torch.float32, device=x.device
        )
        num_tiles, itemsize = groups.table.shape[1], x.element_size()
        blocks, constants = _shrink_constants(shape, splits, itemsize)
        launch(_shrink, (num_tiles, blocks * splits))(
            *(x, slots.a, groups.order, groups.table, shrunk),
            *(num_tokens, x.stride(0), num_tiles),
            **constants,
        )
        blocks, constants = _expand_constants(shape, splits)
        launch(_expand, (num_tiles, blocks))(
            *(shrunk, slots.b, groups.order, groups.table, y),
            *(num_tokens, num_tiles),
            **constants,
        )


TRITON_LORA = TritonLoRA()


def group_by_adapter(adapters: Tensor, num_slots: int) -> Groups:
    """adapters [T] int32 (-1: none) -> the same by slot. A few small ops of torch, once a step."""
    num_tokens, device = len(adapters), adapters.device
    order = torch.argsort(adapters, stable=True)
    slots = torch.arange(num_slots, dtype=torch.int32, device=device)
    counts = (adapters[None, :] == slots[:, None]).sum(1)
    first = num_tokens - counts.sum() + counts.cumsum(0) - counts  # those without one stand before
    tiles_of = (counts + TILE - 1) // TILE
    last_tile = tiles_of.cumsum(0)
    tile = torch.arange(num_tokens // TILE + min(num_tokens, num_slots), device=device)
    slot = torch.searchsorted(last_tile, tile, right=True)
    is_there, slot = slot < num_slots, slot.clamp(max=num_slots - 1)
    start = first[slot] + (tile - (last_tile - tiles_of)[slot]) * TILE
    end = torch.minimum(start + TILE, (first + counts)[slot])
    return Groups(order.int(), torch.stack((slot, start, end * is_there)).int())


@cache
def _shrink_constants(shape: LoRAShape, splits: int, itemsize: int) -> tuple[int, dict[str, Any]]:
    """(blocks of A's rows, keywords of the launch)"""
    rows, step = len(shape.parts) * shape.rank, DEPTH_BYTES // itemsize
    block = max(16, min(64, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    return blocks, {
        "ROWS": rows,
        "DEPTH": shape.in_features,
        "SPLIT": triton.cdiv(triton.cdiv(shape.in_features, splits), step) * step,
        "BLOCKS": blocks,
        "BLOCK_T": TILE,
        "BLOCK_R": block,
        "BLOCK_K": step,
        "num_warps": 4,
        "num_stages": 3,
        **launch_options(),
    }


@cache
def _expand_constants(shape: LoRAShape, splits: int) -> tuple[int, dict[str, Any]]:
    """(blocks of y's columns, keywords of the launch)"""
    parts = (*shape.parts, 0, 0)[:MOST_PARTS]
    blocks = [triton.cdiv(part, OUTPUTS) for part in parts]
    return sum(blocks), {
        "RANK": shape.rank,
        "PARTS": len(shape.parts),
        "SPLITS": splits,
        "FIRST": parts[0],
        "SECOND": parts[1],
        "THIRD": parts[2],
        "BLOCK_T": TILE,
        "BLOCK_R": max(16, min(64, triton.next_power_of_2(shape.rank))),
        "BLOCK_N": OUTPUTS,
        "num_warps": 4,
        "num_stages": 2,
        **launch_options(),
    }


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _shrink(
    x,
    a,
    order,
    table,
    shrunk,
    num_tokens,
    x_stride,
    num_tiles,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile's tokens through a block of A's rows, over one part of the input features."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    place = tl.load(table + num_tiles + tile)
    end = tl.load(table + 2 * num_tiles + tile)
    if place >= end:
        return
    slot = tl.load(table + tile).to(tl.int64)
    block = tl.program_id(1) % BLOCKS
    split = tl.program_id(1) // BLOCKS
    place += tl.arange(0, BLOCK_T)
    there = place < end
    token = tl.load(order + place, mask=there, other=0).to(tl.int64)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    xs = x + token[:, None] * x_stride
    rows = a + (slot * ROWS + tl.minimum(row, ROWS - 1))[None, :] * DEPTH
    sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, SPLIT, BLOCK_K):
        depth = split * SPLIT + start + k
        inside = depth < DEPTH
        values = tl.load(xs + depth[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        weights = tl.load(rows + depth[:, None], mask=inside[:, None], other=0.0)
        sums = tl.dot(values, weights, sums, input_precision="ieee")
    target = shrunk + (split * num_tokens + place).to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(target, sums, mask=there[:, None] & (row < ROWS)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _expand(
    shrunk,
    b,
    order,
    table,
    y,
    num_tokens,
    num_tiles,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile's sums through a block of B's rows, all of one part, added to y."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    place = tl.load(table + num_tiles + tile)
    end = tl.load(table + 2 * num_tiles + tile)
    if place >= end:
        return
    slot = tl.load(table + tile).to(tl.int64)
    place += tl.arange(0, BLOCK_T)
    there = place < end
    token = tl.load(order + place, mask=there, other=0).to(tl.int64)
    # Which part this block is of, and where in y that begins.
    OF_FIRST: tl.constexpr = (FIRST + BLOCK_N - 1) // BLOCK_N
    OF_SECOND: tl.constexpr = (SECOND + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(1)
    part = (block >= OF_FIRST).to(tl.int32)
    part += (block >= OF_FIRST + OF_SECOND).to(tl.int32)
    size = tl.where(part == 0, FIRST, tl.where(part == 1, SECOND, THIRD))
    begin = tl.where(part == 0, 0, tl.where(part == 1, FIRST, FIRST + SECOND))
    before = tl.where(part == 0, 0, tl.where(part == 1, OF_FIRST, OF_FIRST + OF_SECOND))
    n = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = begin + tl.minimum(n, size - 1)
    outputs: tl.constexpr = FIRST + SECOND + THIRD
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = r < RANK
        mask = there[:, None] & inside[None, :]
        values = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for split in range(SPLITS):
            row = (split * num_tokens + place).to(tl.int64)[:, None] * (PARTS * RANK)
            values += tl.load(shrunk + row + part * RANK + r[None, :], mask=mask, other=0.0)
        rows = b + (slot * outputs + column)[None, :] * RANK + r[:, None]
        weights = tl.load(rows, mask=inside[:, None], other=0.0)
        sums = tl.dot(values.to(weights.dtype), weights, sums, input_precision="ieee")
    target = y + token[:, None] * outputs + (begin + n)[None, :]
    mask = there[:, None] & (n < size)[None, :]
    sums += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, sums.to(y.dtype.element_ty), mask=mask)
