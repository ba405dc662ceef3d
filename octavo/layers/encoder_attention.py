"""Attention of tokens to all of their segment. Knows heads; no caches, no requests, no weights."""

from typing import Any

from torch import Tensor

from octavo.kernels import ENCODER_ATTENTION, Choice, Segments
from octavo.layers.build import Build, Layer


class EncoderAttention(Layer):
    """Queries of a segment see all of its keys, which must be there as a whole."""

    def __init__(self, num_heads: int, head_dim: int, build: Build, *, scale: float | None = None):
        """`scale`: of the scores; by default 1 / sqrt(head_dim)."""
        super().__init__()
        self.num_heads, self.head_dim = build.group.local(num_heads, "attention heads"), head_dim
        sizes = {"num_heads": self.num_heads, "head_dim": head_dim}
        self._choice = ENCODER_ATTENTION.select(build.case(sizes))
        self._attend = self._choice.function
        self._scale = head_dim**-0.5 if scale is None else scale

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Segments,
        keys: Segments | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [S, H, D] -> [T, H, D].

        Without `keys` the segments are those of the queries.
        """
        keys = queries if keys is None else keys
        return self._attend(query, key, value, queries, keys, self._scale)
