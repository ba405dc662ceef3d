"""GPT-NeoX-20B (arXiv 2204.06745) and Pythia (arXiv 2304.01373).

Llama's attention, with the norms and the MLP that its config names; attention and MLP may read the
same stream. Its checkpoints have each head's query, key and value side by side.
"""

from torch import Tensor

from octavo.config import ModelConfig
from octavo.layers import Build, PlainMLP, Slot, StepContext
from octavo.models.decoder import Decoder
from octavo.models.llama import LlamaAttention, LlamaBlock


class GPTNeoXAttention(LlamaAttention):
    """As Llama's, with one tensor for three projections."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, **parts: object):
        super().__init__(config, layer, build, **parts)  # type: ignore[arg-type]
        self.num_heads = config.layers[layer].attention.num_heads

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = self.qkv.fused_slots(f"{name}.query_key_value", groups=self.num_heads)
        return qkv | self.output.fused_slots(f"{name}.dense")


class GPTNeoXBlock(LlamaBlock):
    """One transformer block. Where it is parallel, both halves read what came in."""

    mlp: PlainMLP

    def __init__(self, config: ModelConfig, layer: int, build: Build, attention: LlamaAttention):
        super().__init__(config, layer, build, attention)
        self.is_parallel = config.layers[layer].parallel

    def slots(self, name: str) -> dict[str, Slot]:
        return (
            self.attention_norm.slots(f"{name}.input_layernorm")
            | self.attention.slots(f"{name}.attention")
            | self.mlp_norm.slots(f"{name}.post_attention_layernorm")
            | self.mlp.slots(f"{name}.mlp", "dense_h_to_4h", "dense_4h_to_h")
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        if not self.is_parallel:
            return super().forward(x, residual, context)
        x, residual = self.attention_norm(x, residual)
        x, residual = context.wanted_of(self.attention(x, context), residual)
        y, residual = self.mlp_norm(residual)
        return x.add_(self.mlp(y)), residual


class GPTNeoX(Decoder):
    """Embedding, blocks, norm, head."""

    attention_type = GPTNeoXAttention
    block_type = GPTNeoXBlock

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        table = self.vocabulary.slots("gpt_neox.embed_in", "lm_head")
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"gpt_neox.layers.{index}")
        return table | self.norm.slots("gpt_neox.final_layer_norm")

    def slot_name(self, name: str) -> str:
        """EleutherAI's checkpoints call the output head by its old name."""
        return "lm_head.weight" if name == "embed_out.weight" else name
