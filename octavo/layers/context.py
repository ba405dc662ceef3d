"""What all layers of one forward pass share: where the tokens stand and where their KV goes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels import AttentionBatch, Segments


@dataclass(frozen=True, slots=True)
class StepImages:
    """The rows of images among a step's tokens."""

    index: Tensor  # [N] int64: tokens in whose places rows go, each once
    rows: Tensor  # [N, hidden_size]


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
    # `slots` and `attention` of KV groups 1 and on; those above are of group 0.
    other_groups: tuple[tuple[Tensor, AttentionBatch], ...] = ()

    @property
    def segments(self) -> Segments:
        """The tokens of each sequence, for attention that has no cache."""
        return Segments(self.attention.query_starts, self.attention.max_query_len)

    def of_group(self, group: int) -> "StepContext":
        """The same step as layers of another KV group than 0 see it."""
        slots, attention = self.other_groups[group - 1]
        return replace(self, slots=slots, attention=attention)

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
        if images is None:
            return x
        return x.index_copy(0, images.index, images.rows)
