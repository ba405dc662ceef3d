"""Which tensors of a checkpoint a model has a place for, told before anything is loaded.

For people who look at a model, or write one (`octavo inspect --fit`): loading stops where this goes
on. Knows shapes alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octavo.config import ModelConfig
from octavo.layers import Build
from octavo.models import create_model
from octavo.weights.loading import is_ignorable

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Misfits:
    """What keeps a checkpoint from being loaded; all empty where nothing does."""

    missing: dict[str, Shape]  # that the model waits for
    unexpected: dict[str, Shape]  # that it has no place for
    reshaped: dict[str, tuple[Shape, Shape]]  # (in the checkpoint, in the model)


def misfits(config: ModelConfig, shapes: Mapping[str, Shape]) -> Misfits:
    """Hold a checkpoint's tensors, under Hugging Face's names, to the places of a model.

    Raises:
        ConfigError: another package brings the architecture, and its model cannot be imported.
    """
    build = Build("meta", getattr(torch, config.dtype))
    model = create_model(config, build, max_positions=1)
    places = {name: slot.shape for name, slot in model.slots().items()}
    named = ((model.slot_name(name), shape) for name, shape in shapes.items())
    found = {name: shape for name, shape in named if name is not None}
    return Misfits(
        missing={name: shape for name, shape in places.items() if name not in found},
        unexpected={
            name: shape
            for name, shape in found.items()
            if name not in places and not is_ignorable(name)
        },
        reshaped={
            name: (found[name], shape)
            for name, shape in places.items()
            if found.get(name, shape) != shape
        },
    )
