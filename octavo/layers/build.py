"""What every layer is told when it is built, and the report of what each one got."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octavo.kernels import Case, Choice
from octavo.parallel import ParallelGroup
from octavo.quant import DenseFormat, StoredWeight, WeightFormat


@dataclass(frozen=True, slots=True)
class Build:
    """Where and how a model is built. One for the whole model."""

    device: str
    dtype: torch.dtype
    block_size: int = 16  # tokens in a KV block
    batch_invariant: bool = False  # kernels whose bits for a row do not depend on other rows
    count_expert_tokens: bool = False  # mixtures of experts count whom they send tokens to
    kv_groups: tuple[int, ...] = ()  # of each layer: whose block table it reads; empty: all group 0
    group: ParallelGroup = field(default_factory=ParallelGroup)
    weights: WeightFormat = field(default_factory=DenseFormat)

    def case(self, sizes: Mapping[str, int] | None = None) -> Case:
        """What kernels are asked to support."""
        promises = {"batch_invariant": 1} if self.batch_invariant else {}
        return Case(self.device, self.dtype, {**(sizes or {}), **promises})

    def weight(self, out_features: int, in_features: int) -> StoredWeight:
        """Storage for one weight [out_features, in_features]."""
        sizes = {"out_features": out_features, "in_features": in_features}
        return self.weights.create(self.case(sizes))


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One line of the answer to "which kernel did this layer get, and why?"."""

    layer: str
    choice: Choice[Any]


class Layer(nn.Module):
    """A module that has something to do, or to report, once its weights are there."""

    def finish(self) -> tuple[Choice[Any], ...]:
        """Lay weights out for their kernels; return the kernels that this layer runs."""
        return ()


def finish_layers(model: nn.Module) -> tuple[KernelReport, ...]:
    """Finish every layer of a model whose weights are loaded; report what each one got."""
    return tuple(
        KernelReport(name, choice)
        for name, module in model.named_modules()
        if isinstance(module, Layer)
        for choice in module.finish()
    )
