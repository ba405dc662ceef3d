"""From a stream of named tensors into the slots of a model.

Owns the rule that names and shapes must match exactly, both ways. Knows no file formats, and not
what a slot does with its tensor (the layers do).
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.config import excerpt
from octavo.errors import CheckpointError
from octavo.layers import Slot

MAX_NAMES_IN_MESSAGE = 6
MAX_NAME_CHARS = 80


@dataclass(frozen=True, slots=True)
class TensorStream:
    """The tensors of a checkpoint: names and shapes are known, the data comes one at a time."""

    source: str  # for error messages: the path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.read()


def load_weights(table: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hand every tensor to its slot, once.

    A `TensorStream` is checked as a whole before the first tensor is read. Ignored are rotary
    frequencies, which old checkpoints store, and an `lm_head.weight` that has no slot because the
    model uses its embedding in its place.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or not finite.
    """
    source = "the checkpoint"
    if isinstance(tensors, TensorStream):
        source = tensors.source
        check_shapes({name: slot.shape for name, slot in table.items()}, tensors)
    loaded: dict[str, None] = {}
    for name, tensor in tensors:
        if name in loaded:
            raise CheckpointError(f"{source}: tensor {name!r} occurs twice")
        loaded[name] = None
        if name not in table and _is_ignorable(name):
            continue
        if name not in table:
            raise CheckpointError(f"{source}: unexpected tensor {name!r}")
        _check_shape(name, tuple(tensor.shape), table[name].shape, source=source)
        if not _is_finite(tensor):
            raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity")
        table[name].load(tensor)
    _check_names(table, loaded, source)


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: TensorStream) -> None:
    """Hold the names and shapes of a whole checkpoint against those that a model has slots for.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    _check_names(expected, tensors.shapes, tensors.source)
    for name, shape in tensors.shapes.items():
        if name in expected:
            _check_shape(name, shape, expected[name], source=tensors.source)


def _check_names(table: Collection[str], names: Iterable[str], source: str) -> None:
    names = set(names)
    missing = [name for name in table if name not in names]
    unexpected = sorted(name for name in names if name not in table and not _is_ignorable(name))
    complaints = [
        f"{what} {_enumerated(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected))
        if found
    ]
    if complaints:
        raise CheckpointError(f"{source}: {'; '.join(complaints)}")


def _check_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], *, source: str
) -> None:
    if shape != expected:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {excerpt(shape, MAX_NAME_CHARS)}, but the config "
            f"asks for {expected}"
        )


def _is_ignorable(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporaries; NaN makes both ends NaN.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _enumerated(names: list[str]) -> str:
    shown = ", ".join(excerpt(repr(name), MAX_NAME_CHARS) for name in names[:MAX_NAMES_IN_MESSAGE])
    num_more = len(names) - MAX_NAMES_IN_MESSAGE
    return f"tensors {shown}" + (f" and {num_more} more" if num_more > 0 else "")
