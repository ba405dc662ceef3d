"""Gemma 2 (arXiv 2408.00118): Llama's decoder, with a norm at the end of each branch as well.

What else differs is in its config: windows, softcaps, gelu, norms around one, scaled embeddings.
"""

from torch import Tensor

from octavo.config import ModelConfig
from octavo.layers import Build, Slot, StepContext, residual_norm
from octavo.models.llama import Llama, LlamaAttention, LlamaBlock


class Gemma2Block(LlamaBlock):
    """Attention and feed-forward, each between two norms: before it, and before it is added."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, attention: LlamaAttention):
        super().__init__(config, layer, build, attention)
        self.attention_output_norm = residual_norm(config, build)
        self.mlp_output_norm = residual_norm(config, build)

    def slots(self, name: str) -> dict[str, Slot]:
        return (
            self.attention_norm.slots(f"{name}.input_layernorm")
            | self.attention.slots(f"{name}.self_attn")
            | self.attention_output_norm.slots(f"{name}.post_attention_layernorm")
            | self.mlp_norm.slots(f"{name}.pre_feedforward_layernorm")
            | self.mlp_slots(name)
            | self.mlp_output_norm.slots(f"{name}.post_feedforward_layernorm")
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(x, residual)
        x, residual = context.wanted_of(self.attention(x, context), residual)
        x = self.attention_output_norm(x)[0]  # a name for the other would keep its memory
        x, residual = self.mlp_norm(x, residual)
        return self.mlp_output_norm(self.mlp(x))[0], residual


class Gemma2(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    block_type = Gemma2Block
