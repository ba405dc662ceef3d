"""From a stream of named tensors into the slots of a model.

Owns the rule that names and shapes must match exactly, both ways. Knows no file formats, and not
what a slot does with its tensor (the layers do).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.layers import Slot

MAX_NAMES_IN_MESSAGE = 6


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
        _check_names(table, tensors.shapes, source)
        for name, shape in tensors.shapes.items():
            _check_shape(table, name, shape, source=source)
    loaded: dict[str, None] = {}
    for name, tensor in tensors:
        if name in loaded:
            raise CheckpointError(f"{source}: tensor {name!r} occurs twice")
        loaded[name] = None
        if name not in table and _is_ignorable(name):
            continue
        if name not in table:
            raise CheckpointError(f"{source}: unexpected tensor {name!r}")
        _check_shape(table, name, tuple(tensor.shape), source=source)
        if not _is_finite(tensor):
            raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity")
        table[name].load(tensor)
    _check_names(table, loaded, source)


def _check_names(table: Mapping[str, Slot], names: Iterable[str], source: str) -> None:
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
    table: Mapping[str, Slot], name: str, shape: tuple[int, ...], *, source: str
) -> None:
    if name in table and table[name].shape != shape:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {shape}, but the config asks for "
            f"{table[name].shape}"
        )


def _is_ignorable(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporaries; NaN makes both ends NaN.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _enumerated(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_IN_MESSAGE])
    num_more = len(names) - MAX_NAMES_IN_MESSAGE
    return f"tensors {shown}" + (f" and {num_more} more" if num_more > 0 else "")
