"""What nearly all architectures share: embedding, blocks one after the other, norm, head.

A block takes its neighbour's output and the residual stream apart, so that its first norm adds
them up. Knows no checkpoint names and not what is in a block.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from octavo.config import ModelConfig, Rope
from octavo.layers import Build, Rotary, StepContext, create_vocabulary, residual_norm
from octavo.models.base import Model


class Decoder(Model):
    """The decoder: embedding, blocks, norm, head."""

    attention_type: ClassVar[Callable[..., Any]]
    block_type: ClassVar[Callable[..., Any]]

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__()
        rotary: dict[Rope | None, Rotary] = {
            rope: Rotary(rope, max_positions, build) for rope in config.ropes
        }
        self._rotary = rotary
        self.vocabulary = create_vocabulary(config, build)
        blocks = []
        for index, layer in enumerate(config.layers):
            angles = rotary.get(layer.attention.rope)
            attention = self.attention_type(config, index, build, rotary=angles)
            blocks.append(self.block_type(config, index, build, attention))
        self.blocks = nn.ModuleList(blocks)  # registers them; the list keeps their type
        self._blocks = blocks
        self._kinds = config.layers
        self.norm = residual_norm(config, build)

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones [S, hidden_size]."""
        x: Tensor = self.embed(token_ids, context)
        residual: Tensor | None = None
        *blocks, last = self._blocks
        of_all = context.of_all()
        for block in blocks:
            x, residual = block(x, residual, of_all)
        # All that anybody will ask of the other tokens is in the KV cache by then.
        x, residual = last(x, residual, context)
        x, _ = self.norm(x, residual)
        return x

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> what the first block reads, [T, hidden_size]."""
        x: Tensor = self.vocabulary.embed(token_ids)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], in the weights' dtype."""
        return self.vocabulary.logits(hidden)
