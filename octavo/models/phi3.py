"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv 2404.14219, 2503.01743): Llama's decoder.

Only its checkpoint names: queries, keys and values are one tensor, gate and up another.
"""

from octavo.layers import GatedMLP, Slot
from octavo.models.llama import Llama, LlamaAttention, LlamaBlock


class Phi3Attention(LlamaAttention):
    """As Llama's, with one tensor for three projections."""

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = self.qkv.fused_slots(f"{name}.qkv_proj")
        return qkv | self.output.fused_slots(f"{name}.o_proj")


class Phi3Block(LlamaBlock):
    """As Llama's, with one tensor for gate and up."""

    mlp: GatedMLP

    def mlp_slots(self, name: str) -> dict[str, Slot]:
        gate_up = self.mlp.gate_up.fused_slots(f"{name}.mlp.gate_up_proj")
        return gate_up | self.mlp.down.fused_slots(f"{name}.mlp.down_proj")


class Phi3(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    attention_type = Phi3Attention
    block_type = Phi3Block
