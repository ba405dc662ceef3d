"""What all layers of one forward pass share: where the tokens stand and where their KV goes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepImages:
    """What a step's tokens are of images, or stand behind some."""

    index: Tensor | None  # [N] int64: tokens in whose places rows go, each once; None: no rows
    rows: Tensor | None  # [N, hidden_size]
    positions: Tensor | None = None  # [3, T] int64: time, down, across, where a model turns by them


@dataclass(frozen=True, slots=True)
class StepContext:
    """The geometry of one step of T tokens. Passed explicitly: there is no global."""

    positions: Tensor  # [T] int64: each token's position in its sequence
    slots: Tensor  # [T] int64: block id * block size + offset, where its key and value go
    attention: AttentionBatch
    kv_caches: Sequence[Tensor]  # one a layer, shaped as its `KVSpec` says
    wanted: Tensor | None = None  # [S]: tokens whose hidden states are asked for; None: all
    images: StepImages | None = None
    angles: Tensor | None = None  # [T, rotary_dim] fp32: a row a token, which `positions` count

    def of_all(self) -> "StepContext":
        """The same step, with all tokens wanted."""
        return self if self.wanted is None else replace(self, wanted=None)

    def wanted_of(self, *hidden: Tensor) -> tuple[Tensor, ...]:
        """The rows of the wanted tokens of each [T, ...]."""
        if self.wanted is None:
            return hidden
        wanted = self.wanted
        return tuple(rows.index_select(0, wanted) for rows in hidden)

    def with_images(self, x: Tensor) -> Tensor:
        """Embeddings of all tokens [T, hidden_size] with the rows of images in their places."""
        images = self.images
        if images is None or images.index is None or images.rows is None:
            return x
        return x.index_copy(0, images.index, images.rows)
