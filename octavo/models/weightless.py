"""A model without its weights: which kernels its layers would run, told before anything is loaded.

Knows what a layer asks when it is built. Does not know how the answer is shown.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from octavo.config import ResolvedConfig
from octavo.errors import IntegrityError
from octavo.kernels import LINEAR, MOE_EXPERTS, Case, Choice, Op
from octavo.layers import Build, KernelReport, finish_layers
from octavo.models import create_model


class _NoWeight:
    """Chooses a kernel as a dense weight does, and stores nothing."""

    plain = None

    def __init__(self, op: Op[Any], case: Case):
        self._choice = op.select(case)

    def place(self, rows: slice, tensor: Tensor) -> None:
        pass

    def place_gate_up(self, expert: int, rows: slice, tensor: Tensor) -> None:
        pass

    def place_down(self, expert: int, tensor: Tensor) -> None:
        pass

    def finish(self) -> Choice[Any]:
        return self._choice

    def apply(self, x: Tensor, *more: Tensor | None) -> Tensor:
        raise IntegrityError("a model without weights was asked to compute")

    def gather_rows(self, ids: Tensor) -> Tensor:
        raise IntegrityError("a model without weights was asked to compute")


class NoWeights:
    """A format of weights that only notes which were asked for."""

    name = "none"

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def create(self, case: Case) -> _NoWeight:
        """As WeightFormat."""
        self.cases.append(case)
        return _NoWeight(LINEAR, case)

    def create_experts(self, case: Case) -> _NoWeight:
        """As WeightFormat."""
        self.cases.append(case)
        return _NoWeight(MOE_EXPERTS, case)


def kernel_reports(config: ResolvedConfig) -> tuple[KernelReport, ...]:
    """What each layer of an engine with this config gets, on the device of the config.

    Allocates vectors only: a few KiB a layer.
    """
    build = Build(
        config.device,
        getattr(torch, config.dtype),
        config.block_size,
        batch_invariant=config.batch_invariant,
        weights=NoWeights(),
    )
    # An embedding apart from the head is looked up by torch: it would be allocated for nothing.
    tied = dataclasses.replace(config.model, tie_word_embeddings=True)
    return finish_layers(create_model(tied, build, max_positions=1))
