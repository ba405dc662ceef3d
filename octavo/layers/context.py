"""What all layers of one forward pass share: where the tokens stand and where their KV goes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepContext:
    """The geometry of one step of T tokens. Passed explicitly: there is no global."""

    positions: Tensor  # [T] int64: each token's position in its sequence
    slots: Tensor  # [T] int64: block id * block size + offset, where its key and value go
    attention: AttentionBatch
    kv_caches: Sequence[Tensor]  # one a layer: [2, num_blocks, Hkv, block_size, D]
    wanted: Tensor | None = None  # [S]: tokens whose hidden states are asked for; None: all

    def of_all(self) -> "StepContext":
        """The same step, with all tokens wanted."""
        return self if self.wanted is None else replace(self, wanted=None)

    def wanted_of(self, *hidden: Tensor) -> tuple[Tensor, ...]:
        """The rows of the wanted tokens of each [T, ...]."""
        if self.wanted is None:
            return hidden
        wanted = self.wanted
        return tuple(rows.index_select(0, wanted) for rows in hidden)
