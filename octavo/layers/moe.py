"""A mixture of experts: a router, the experts that it chooses, and those that all tokens share.

Carries sharding and weight formats, as `Linear` does. A tensor-parallel rank holds its share of
each expert's inner numbers, and all of the router.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.config import MLPConfig, MoEConfig
from octavo.kernels import MOE_ROUTE, Choice, Routing
from octavo.layers.build import Build, Layer
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP
from octavo.layers.plain_mlp import PlainMLP
from octavo.layers.slot import Slot

# The checkpoint's names of an expert's gate, up and down.
USUAL_NAMES = ("gate_proj", "up_proj", "down_proj")


class MixtureOfExperts(Layer):
    """The sum of a token's experts, times the router's weights, and of the shared block."""

    def __init__(self, config: MoEConfig, hidden_size: int, build: Build):
        super().__init__()
        self._config, self._hidden_size, self._group = config, hidden_size, build.group
        self._share = build.group.share(config.intermediate_size, "an expert's inner numbers")
        self.router = Linear({"gate": config.num_experts}, hidden_size, build)
        sizes = {
            "num_experts": config.num_experts,
            "num_experts_per_token": config.num_experts_per_token,
            "in_features": hidden_size,
            "size": self._share.stop - self._share.start,
        }
        case = build.case(sizes)
        self.experts = build.weights.create_experts(case)
        self.shared = None if config.shared is None else GatedMLP(config.shared, hidden_size, build)
        self._route_choice = MOE_ROUTE.select(case)
        self._route = self._route_choice.function
        self.counts: Tensor | None = None  # [num_experts] int64: tokens that each one got
        if build.count_expert_tokens:
            self.counts = torch.zeros(config.num_experts, dtype=torch.int64, device=build.device)
        self._routing = Routing(
            config.num_experts_per_token,
            norm_topk_prob=config.norm_topk_prob,
            scaling_factor=config.scaling_factor,
            num_groups=config.num_groups,
            num_groups_per_token=config.num_groups_per_token,
        )

    def slots(self, name: str, parts: tuple[str, str, str] = USUAL_NAMES) -> dict[str, Slot]:
        """The table of checkpoint tensors, given its names of an expert's gate, up and down."""
        table = self.router.slots({"gate": f"{name}.gate"})
        size, width = self._config.intermediate_size, self._hidden_size
        for expert in range(self._config.num_experts):
            gate, up, down = (f"{name}.experts.{expert}.{part}.weight" for part in parts)
            table[gate] = Slot((size, width), self._inner_loader(expert, 0))
            table[up] = Slot((size, width), self._inner_loader(expert, 1))
            table[down] = Slot((width, size), partial(self._load_down, expert))
        if self.shared is not None:
            table |= self.shared.slots(f"{name}.shared_experts")
        return table

    def _inner_loader(self, expert: int, half: int) -> Callable[[Tensor], None]:
        size = self._share.stop - self._share.start
        rows = slice(half * size, (half + 1) * size)
        return lambda tensor: self.experts.place_gate_up(expert, rows, tensor[self._share])

    def _load_down(self, expert: int, tensor: Tensor) -> None:
        self.experts.place_down(expert, tensor[:, self._share])

    def finish(self) -> tuple[Choice[Any], ...]:
        return self._route_choice, self.experts.finish()

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        weights, experts = self._route(self.router(x), self._routing)
        if self.counts is not None:
            chosen = experts.flatten().long()
            self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        y = self._group.all_reduce(self.experts.apply(x, weights, experts))
        return y if self.shared is None else y + self.shared(x)


def feed_forward(
    config: MLPConfig | MoEConfig, hidden_size: int, build: Build
) -> GatedMLP | PlainMLP | MixtureOfExperts:
    """The block, or the mixture of them, that a layer's config asks for."""
    if isinstance(config, MoEConfig):
        return MixtureOfExperts(config, hidden_size, build)
    kind = GatedMLP if config.gated else PlainMLP
    return kind(config, hidden_size, build)


def expert_tokens(model: nn.Module) -> dict[str, list[int]]:
    """{layer: how many tokens each of its experts got}; waits for the device."""
    named = dict(_counts(model))
    if not named:
        return {}
    together = torch.cat(tuple(named.values())).cpu()  # one copy, so one wait
    parts = torch.split(together, [len(counts) for counts in named.values()])
    return {name: part.tolist() for name, part in zip(named, parts, strict=True)}


def forget_expert_tokens(model: nn.Module) -> None:
    """Count from 0 on."""
    for _, counts in _counts(model):
        counts.zero_()


def _counts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts) and module.counts is not None:
            yield name, module.counts
