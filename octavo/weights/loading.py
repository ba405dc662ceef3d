"""From a stream of named tensors into the slots of a model.

Owns the rule that names and shapes must match exactly, both ways. Knows no file formats, and not
what a slot does with its tensor (the layers do).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.config import excerpt
from octavo.errors import CheckpointError
from octavo.layers import Slot

MAX_NAMES_IN_MESSAGE = 6
MAX_NAME_CHARS = 80
# The ends of names of what old checkpoints store although it follows from the config: rotary
# frequencies; the causal masks of GPT-2 and GPT-NeoX, and the numbers that stand where they hide;
# BERT's positions, which are counted.
CONSTANTS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "embeddings.position_ids",
)


@dataclass(frozen=True, slots=True)
class TensorStream:
    """The tensors of a checkpoint: names and shapes are known, the data comes one at a time."""

    source: str  # for error messages: the path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.read()

    def renamed(self, name_of: Callable[[str], str | None]) -> "TensorStream":
        """The same tensors under other names; those whose name is None are left out.

        Raises:
            CheckpointError: two of them get one name.
        """
        known = {name: new for name in self.shapes if (new := name_of(name)) is not None}
        shapes = {new: self.shapes[name] for name, new in known.items()}
        if len(shapes) != len(known):
            twice = Counter(known.values()).most_common(1)[0][0]
            raise CheckpointError(
                f"{self.source}: tensor {twice!r} occurs twice, with and without a prefix"
            )
        read = self.read
        return replace(
            self,
            shapes=shapes,
            read=lambda: ((known[name], tensor) for name, tensor in read() if name in known),
        )


def load_weights(table: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hand every tensor to its slot, once.

    A `TensorStream` is checked as a whole before the first tensor is read. Ignored are rotary
    frequencies and causal masks, which old checkpoints store, and an `lm_head.weight` that has no
    slot because the model uses its embedding in its place.

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
        if name not in table and is_ignorable(name):
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
    unexpected = sorted(name for name in names if name not in table and not is_ignorable(name))
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


def is_ignorable(name: str) -> bool:
    """Whether a checkpoint may have a tensor of that name that no model waits for."""
    return name == "lm_head.weight" or name.endswith(CONSTANTS)


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporaries; NaN makes both ends NaN.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _enumerated(names: list[str]) -> str:
    shown = ", ".join(excerpt(repr(name), MAX_NAME_CHARS) for name in names[:MAX_NAMES_IN_MESSAGE])
    num_more = len(names) - MAX_NAMES_IN_MESSAGE
    return f"tensors {shown}" + (f" and {num_more} more" if num_more > 0 else "")
