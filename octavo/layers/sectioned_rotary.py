"""M-RoPE (arXiv 2409.12191, section 2.1): tokens that have a position in time, down and across.

A head's pairs are dealt out to the three in sections. The cache and the kernels know nothing of it:
they get a table of a row for each token of the step, in the place of one for each position.
"""

from dataclasses import replace

import torch
from torch import Tensor

from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.rotary import Rotary


class SectionAngles:
    """Makes the rows of a step, once for all layers.

    told: [3 n] int32, where whoever runs the model has written time, down and across of the n
    tokens of the step, one after the other. Until there is such a place all tokens are of text.
    """

    told: Tensor | None = None

    def __init__(self, rotary: Rotary, sections: tuple[int, ...]):
        self._cos_sin = rotary.cos_sin
        device = self._cos_sin.device
        of_pairs = [axis for axis, num_pairs in enumerate(sections) for _ in range(num_pairs)]
        self._axes = torch.tensor(
            2 * of_pairs, device=device
        )  # of each column: cosines, then sines
        self._columns = torch.arange(len(self._axes), device=device)[:, None]

    def turned(self, context: StepContext) -> StepContext:
        """The step as `SectionedAttention` reads it. Text has one position for all three."""
        num_tokens = len(context.positions)
        positions = context.positions.expand(3, -1)
        if self.told is not None:
            positions = self.told[: 3 * num_tokens].view(3, num_tokens)
        # [rotary_dim, T] and back: each column looks its token up at the position of its axis.
        angles = self._cos_sin[positions[self._axes], self._columns].T.contiguous()
        return replace(
            context, positions=torch.arange(len(angles), device=angles.device), angles=angles
        )


class SectionedAttention(Attention):
    """Attention that rotates by the step's own table."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: StepContext) -> Tensor:
        """As Attention."""
        cache, slots = context.kv_caches[self._layer], context.slots
        angles = (context.positions, context.angles)
        self._write(query, key, value, *angles, cache, slots, *self._norms)
        return self._attend(query, cache, context.attention, self._scale)
