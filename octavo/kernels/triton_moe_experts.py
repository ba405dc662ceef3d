"""The experts of a mixture in Triton: tokens sorted by expert, then two products over tiles of one.

Owns the kernels and their launch. Nothing is read by the host, and every grid depends on the number
of tokens only, so that a CUDA graph can hold it. Few tokens are bound by reading the weights of the
experts that were chosen: each is read once for every tile of its tokens, which is once. A tile is
the weight's rows by the tokens' (as in `triton_linear`), so that few tokens waste no instructions.

Sums are fp32 in an order that the batch does not change: a tile's size may.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.moe_experts import PlainExperts, check_experts, check_routed
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import DTYPES

# A program that sorts holds [pairs, experts] numbers in its registers.
MOST_SORTED, LEAST_CHUNK, MOST_CHUNK = 1 << 15, 16, 512
MOST_UNSORTED = 32  # pairs; the few of them that share an expert find its weights in the L2 cache
STRETCH = 1024  # of a row, added up by one program


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of the transposed product, and how it is pipelined."""

    pairs: int  # rows of tokens
    outputs: int  # rows of a weight
    depth_bytes: int  # of one such row
    warps: int
    stages: int


# By pairs for each expert there could be: few are bound by the weights' bandwidth. Measured on an
# H100 with the experts of Qwen3-30B-A3B (docs/performance/log.md).
TILES = (
    (16, Tile(16, 128, 256, 4, 5)),
    (64, Tile(32, 64, 128, 4, 4)),
    (128, Tile(64, 128, 128, 4, 3)),
)
LARGEST_TILE = Tile(128, 256, 128, 8, 3)


class TritonMoEExperts:
    """MoEExperts on a GPU."""

    def prepare(self, gate_up: Tensor, down: Tensor) -> PlainExperts:
        check_experts(gate_up, down, DTYPES)
        return PlainExperts(gate_up.contiguous(), down.contiguous())

    def apply(self, x: Tensor, prepared: PlainExperts, weights: Tensor, experts: Tensor) -> Tensor:
        gate_up, down = prepared.gate_up, prepared.down
        num_experts, width, size = down.shape
        check_routed(x, width, down.dtype, weights, experts)
        (num_tokens, num_ranks), num_pairs = experts.shape, experts.numel()
        out = x.new_empty(num_tokens, width)
        if not num_pairs:
            return out.zero_()
        tile = tile_for(num_pairs, num_experts)
        order, table = experts, experts.view(1, -1)
        if num_pairs > MOST_UNSORTED:
            order, table = sort_by_expert(experts, num_experts, tile.pairs)
        inner = x.new_empty(num_pairs, size)
        _multiply(x, gate_up, order, table, inner, tile, num_ranks=num_ranks)
        made = x.new_empty(num_pairs, width)
        _multiply(inner, down, order, table, made, tile, weights=weights)
        stretch = min(STRETCH, triton.next_power_of_2(width))
        launch(_add_up, (num_tokens, triton.cdiv(width, stretch)))(
            made, out, NUM_RANKS=num_ranks, WIDTH=width, STRETCH=stretch, **launch_options()
        )
        return out


EXPERTS = TritonMoEExperts()


def tile_for(num_pairs: int, num_experts: int) -> Tile:
    """The tile for so many pairs of a token and an expert."""
    share = triton.cdiv(num_pairs, num_experts)
    return next((tile for most, tile in TILES if share <= most), LARGEST_TILE)


def sort_by_expert(experts: Tensor, num_experts: int, tile_pairs: int) -> tuple[Tensor, Tensor]:
    """experts [T, k] int32 -> (order [T * k] int32, table [3, tiles] int32).

    `order` has the pairs, as indices into the flat `experts`, by expert and then by index. A column
    of `table` is a tile: (expert, its first place in `order`, the one after its last). There are
    as many columns as there could be tiles; those past the last tile are empty.
    """
    num_pairs = experts.numel()
    padded = triton.next_power_of_2(num_experts)
    chunk = max(LEAST_CHUNK, min(MOST_CHUNK, MOST_SORTED // padded))
    num_chunks = triton.cdiv(num_pairs, chunk)
    num_tiles = min(num_pairs, num_pairs // tile_pairs + num_experts)
    order = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    table = torch.empty(3, num_tiles, dtype=torch.int32, device=experts.device)
    counts = order  # one chunk counts for itself
    constants = {"PADDED": padded, "CHUNK": chunk, "num_warps": 8, **launch_options()}
    if num_chunks > 1:
        counts = torch.empty(num_chunks, padded, dtype=torch.int32, device=experts.device)
        launch(_count, (num_chunks,))(experts, counts, num_pairs, **constants)
    tiles = triton.next_power_of_2(triton.cdiv(num_tiles, num_chunks))
    launch(_sort, (num_chunks,))(
        *(experts, counts, order, table, num_pairs, num_tiles),
        **constants,
        IN_CHUNKS=num_chunks > 1,
        TILE_PAIRS=tile_pairs,
        TILES=tiles,
    )
    return order, table


def _multiply(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    table: Tensor,
    out: Tensor,
    tile: Tile,
    *,
    num_ranks: int = 0,
    weights: Tensor | None = None,
) -> None:
    """The gated half with `num_ranks` (x by token, out by place), the other with `weights`.

    There x is by place and out by pair, each row of it times its weight.
    """
    gated = weights is None
    outputs, depth = weight.shape[1] // (1 + gated), weight.shape[2]
    constants = _constants(tile, depth, weight.element_size(), gated)
    tiles = triton.cdiv(outputs, constants["BLOCK_N"])
    launch(_grouped, (tiles, table.shape[1]))(
        *(x, weight, out if weights is None else weights, order, table, out),
        *(outputs, depth, x.stride(0), table.shape[1]),
        NUM_RANKS=num_ranks,
        SORTED=len(table) > 1,
        **constants,
    )


@cache
def _constants(tile: Tile, depth: int, itemsize: int, gated: bool) -> dict[str, Any]:
    block = tile.depth_bytes // itemsize
    return {
        "GATED": gated,
        "BLOCK_N": tile.outputs // (1 + gated),
        "BLOCK_T": tile.pairs,
        "BLOCK_K": block,
        "WHOLE_K": depth % block == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch_options(),
    }


@triton.jit
def _chosen_of_chunk(experts, num_pairs, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """([CHUNK, PADDED] 1 where a pair's expert is that one, [CHUNK] the pairs)"""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1)
    return (expert[:, None] == tl.arange(0, PADDED)[None, :]).to(tl.int32), pair


@triton.jit(do_not_specialize=["num_pairs"])
def _count(
    experts, counts, num_pairs, PADDED: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """How many pairs of each chunk chose each expert."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    chosen, _ = _chosen_of_chunk(experts, num_pairs, PADDED, CHUNK)
    place = tl.program_id(0) * PADDED + tl.arange(0, PADDED)
    tl.store(counts + place, tl.sum(chosen, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _sort(
    experts,
    counts,
    order,
    table,
    num_pairs,
    num_tiles,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_CHUNKS: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program places the pairs of its chunk, and makes its share of the table of tiles."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    chosen, pair = _chosen_of_chunk(experts, num_pairs, PADDED, CHUNK)
    column = tl.arange(0, PADDED)
    before = tl.zeros([PADDED], tl.int32)  # pairs of earlier chunks that chose each expert
    if IN_CHUNKS:
        total = tl.zeros([PADDED], tl.int32)
        for chunk in range(tl.num_programs(0)):
            row = tl.load(counts + chunk * PADDED + column)
            before += tl.where(chunk < tl.program_id(0), row, 0)
            total += row
    else:
        total = tl.sum(chosen, 0)
    first = tl.cumsum(total, 0) - total
    # The place of each pair: those of its expert begin there, and so many stand before it.
    ranks = tl.cumsum(chosen, 0) - chosen
    place = tl.sum(chosen * ((first + before)[None, :] + ranks), 1)
    tl.store(order + place, pair, mask=pair < num_pairs)

    tiles_of = (total + TILE_PAIRS - 1) // TILE_PAIRS
    last_tile = tl.cumsum(tiles_of, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # A tile's expert has tiles from `first_tile` on and before `last_tile`: one has, or none.
    first_tile = last_tile - tiles_of
    its = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
    its = its.to(tl.int32)
    start = tl.sum(its * (first[None, :] + (tile[:, None] - first_tile[None, :]) * TILE_PAIRS), 1)
    end = tl.minimum(start + TILE_PAIRS, tl.sum(its * (first + total)[None, :], 1))
    there = tile < num_tiles
    tl.store(table + tile, tl.sum(its * column[None, :], 1), mask=there)
    tl.store(table + num_tiles + tile, start, mask=there)
    tl.store(table + 2 * num_tiles + tile, end, mask=there)


@triton.jit(do_not_specialize=["num_tiles"])
def _grouped(
    x,
    weight,
    weights,
    order,
    table,
    out,
    N,
    K,
    x_stride,
    num_tiles,
    NUM_RANKS: tl.constexpr,
    GATED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile [BLOCK_N, BLOCK_T] of the transposed result of one expert.

    Gated, a weight has 2N rows, the gate's first; else each row of the result is weighted. Where
    pairs are not SORTED, each has a tile of its own, and `table` is their experts.
    """
    allow_next(PDL)
    wait_for_inputs(PDL)
    tile = tl.program_id(1)
    expert = tl.load(table + tile).to(tl.int64)
    place, end = tile, tile + 1
    if SORTED:
        place = tl.load(table + num_tiles + tile)
        end = tl.load(table + 2 * num_tiles + tile)
        if place >= end:
            return
    place += tl.arange(0, BLOCK_T)
    there = place < end
    pair = place
    if SORTED:
        pair = tl.load(order + place, mask=there, other=0)
    row = pair // NUM_RANKS if GATED else place
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the last row of the weight lies the last row again: read, and not stored.
    rows = expert * (2 * N if GATED else N) + tl.minimum(n, N - 1)
    ws = weight + rows[:, None] * K + k[None, :]
    us = weight + (rows + N)[:, None] * K + k[None, :]  # read only where there are ups
    xs = x + row.to(tl.int64)[None, :] * x_stride + k[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        if WHOLE_K:
            w = tl.load(ws + start)
            values = tl.load(xs + start, mask=there[None, :], other=0.0)
        else:
            w = tl.load(ws + start, mask=inside[None, :], other=0.0)
            values = tl.load(xs + start, mask=there[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(w, values, sums, input_precision="ieee")
        if GATED:
            if WHOLE_K:
                up = tl.load(us + start)
            else:
                up = tl.load(us + start, mask=inside[None, :], other=0.0)
            ups = tl.dot(up, values, ups, input_precision="ieee")
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * ups
        target = place
    else:
        sums *= tl.load(weights + pair, mask=there, other=0.0)[None, :]
        target = pair
    places = out + target.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), mask=there[None, :] & (n[:, None] < N))


@triton.jit
def _add_up(
    made,
    out,
    NUM_RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One stretch of a token's row: what its experts made, in the order of their ranks."""
    allow_next(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    there = column < WIDTH
    sums = tl.zeros([STRETCH], tl.float32)
    for rank in range(NUM_RANKS):
        place = made + (token * NUM_RANKS + rank) * WIDTH + column
        sums += tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, sums.to(out.dtype.element_ty), mask=there)
