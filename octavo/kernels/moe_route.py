"""Which experts a token goes to, and with which weights.

Owns the op. Does not know what made the logits, nor what experts do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import triton_support
from octavo.kernels.dispatch import Case, Op

MOST_EXPERTS = 4096  # one program holds the logits of a token, padded to a power of two


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses. The same for all tokens."""

    num_experts_per_token: int
    norm_topk_prob: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1  # experts that stand side by side; all groups are of one size
    num_groups_per_token: int = 1  # only experts of a token's best groups are chosen


class MoERoute(Protocol):
    def __call__(self, logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> (weights [T, k] fp32, experts [T, k] int32), the likeliest first.

        The weights are softmax over all E in fp32, taken at the experts that are chosen. Which of
        two experts with the same probability is chosen is each implementation's to decide, but
        depends on this token's logits only.
        """
        ...


def reference_moe_route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if routing.num_groups > 1:
        probabilities = _of_best_groups(probabilities, routing)
    weights, experts = torch.topk(probabilities, routing.num_experts_per_token, dim=-1)
    if routing.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if routing.scaling_factor != 1.0:
        weights = weights * routing.scaling_factor
    return weights, experts.int()


def _of_best_groups(probabilities: Tensor, routing: Routing) -> Tensor:
    """Zeros for the experts of all other groups (arXiv 2405.04434, section 2.2.2)."""
    by_group = probabilities.unflatten(1, (routing.num_groups, -1))
    best = by_group.amax(-1).topk(routing.num_groups_per_token, dim=-1).indices
    others = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, False)
    return by_group.masked_fill(others[..., None], 0.0).flatten(1)


def _unsupported_by_triton(case: Case) -> str | None:
    if (reason := triton_support.unsupported(case)) is not None:
        return reason
    if case.sizes.get("num_experts", 0) > MOST_EXPERTS:
        return f"made for at most {MOST_EXPERTS} experts"
    return None


MOE_ROUTE: Op[MoERoute] = Op("moe_route", reference_moe_route)
MOE_ROUTE.register_module(
    "triton", "octavo.kernels.triton_moe_route:triton_moe_route", _unsupported_by_triton
)
