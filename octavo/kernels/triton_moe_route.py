"""The choice of experts in Triton: one program for a token, which holds all of its logits.

Owns the search for the largest. Of experts with the same probability the first is chosen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.moe_route import Routing
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse


def triton_moe_route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """As MoERoute; rows of logits may be strided."""
    rows, num_experts = logits.shape
    row_stride, dense = logits.stride()
    if dense != 1 or num_experts % routing.num_groups:
        rule = f"logits are [T, E] with dense rows, in {routing.num_groups} groups of one size"
        raise refuse("moe_route", rule, logits=logits)
    shape = rows, routing.num_experts_per_token
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    experts = torch.empty(shape, dtype=torch.int32, device=logits.device)
    if rows:
        constants = _constants(num_experts, routing)
        launch(_moe_route, (rows,))(logits, weights, experts, row_stride, **constants)
    return weights, experts


@cache
def _constants(num_experts: int, routing: Routing) -> dict[str, Any]:
    padded = triton.next_power_of_2(num_experts)
    return {
        "NUM_EXPERTS": num_experts,
        "PADDED": padded,
        "NUM_RANKS": routing.num_experts_per_token,
        "PADDED_RANKS": triton.next_power_of_2(routing.num_experts_per_token),
        "GROUP_SIZE": num_experts // routing.num_groups,
        "NUM_GROUPS": routing.num_groups,
        "NUM_BEST_GROUPS": routing.num_groups_per_token,
        "NORMED": routing.norm_topk_prob,
        "SCALE": routing.scaling_factor,
        "num_warps": min(8, max(1, padded // 256)),
        **launch_options(),
    }


@triton.jit
def _of_best_groups(
    probabilities,
    column,
    NUM_EXPERTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_BEST_GROUPS: tl.constexpr,
):
    """Zeros for the experts of all other groups."""
    group = column // GROUP_SIZE
    best = tl.full(column.shape, -1.0, tl.float32)  # of each expert's group
    for one in tl.static_range(NUM_GROUPS):
        largest = tl.max(tl.where(group == one, probabilities, -1.0), 0)
        best = tl.where(group == one, largest, best)
    chosen = column < 0
    for _ in tl.static_range(NUM_BEST_GROUPS):
        first = tl.argmax(best, 0, tie_break_left=True) // GROUP_SIZE
        chosen = chosen | (group == first)
        best = tl.where(group == first, -1.0, best)
    return tl.where(chosen | (column >= NUM_EXPERTS), probabilities, 0.0)


@triton.jit
def _moe_route(
    logits,
    weights,
    experts,
    row_stride,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_BEST_GROUPS: tl.constexpr,
    NORMED: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    there = column < NUM_EXPERTS
    mine = tl.load(logits + row * row_stride + column, mask=there, other=float("-inf"))
    mine = mine.to(tl.float32)
    powers = tl.exp(mine - tl.max(mine, 0))
    # Below every probability: what fills the row up is never chosen.
    left = tl.where(there, powers / tl.sum(powers, 0), -1.0)
    if NUM_GROUPS > 1:
        left = _of_best_groups(left, column, NUM_EXPERTS, GROUP_SIZE, NUM_GROUPS, NUM_BEST_GROUPS)
    rank = tl.arange(0, PADDED_RANKS)
    best = tl.zeros([PADDED_RANKS], tl.float32)
    ids = tl.zeros([PADDED_RANKS], tl.int32)
    for one in tl.static_range(NUM_RANKS):
        first = tl.argmax(left, 0, tie_break_left=True)
        best = tl.where(rank == one, tl.max(left, 0), best)
        ids = tl.where(rank == one, first.to(tl.int32), ids)
        left = tl.where(column == first, -2.0, left)
    if NORMED:
        best = best / tl.sum(best, 0)
    place = row * NUM_RANKS + rank
    tl.store(weights + place, best * SCALE, mask=rank < NUM_RANKS)
    tl.store(experts + place, ids, mask=rank < NUM_RANKS)
