"""Granite 3.x (arXiv 2408.13359): Llama's decoder and names, with multipliers at three places.

Wiring and checkpoint names only: layers carry all else.
"""

from octavo.layers import Build, StepContext
from octavo.models.llama import Llama, LlamaAttention, LlamaBlock
from torch import Tensor

from octavo_granite.config import GraniteConfig


class GraniteBlock(LlamaBlock):
    """As Llama's, but what it adds to the residual stream is multiplied first."""

    def __init__(self, config: GraniteConfig, layer: int, build: Build, attention: LlamaAttention):
        super().__init__(config, layer, build, attention)
        self.multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, residual: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, context).mul_(self.multiplier)
        x, residual = context.wanted_of(x, residual)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x).mul_(self.multiplier), residual


class Granite(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    block_type = GraniteBlock

    def __init__(self, config: GraniteConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        self.embedding_multiplier = config.embedding_multiplier
        self.logits_scaling = config.logits_scaling

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> what the first block reads, [T, hidden_size]."""
        return super().embed(token_ids, context).mul_(self.embedding_multiplier)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], in the weights' dtype."""
        return super().logits(hidden).div_(self.logits_scaling)
