"""Qwen3's models (arXiv 2505.09388): Llama's decoder, with QK-norm in its attention.

Its mixtures of experts differ in their config only.

Only that difference and its checkpoint names: `octavo.models.llama` has the wiring of the rest.
"""

from octavo.config import ModelConfig
from octavo.layers import Build, QKNorm, Rotary, Slot
from octavo.models.llama import Llama, LlamaAttention


class Qwen3Attention(LlamaAttention):
    """Each query head and each key head goes through an RMS norm before it is rotated."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, *, rotary: Rotary):
        head_dim = config.layers[layer].attention.head_dim
        zero_centered = config.zero_centered_norms
        qk_norm = QKNorm(head_dim, config.norm_eps, build, zero_centered=zero_centered)
        super().__init__(config, layer, build, rotary=rotary, qk_norm=qk_norm)
        self.qk_norm = qk_norm

    def slots(self, name: str) -> dict[str, Slot]:
        return super().slots(name) | self.qk_norm.slots(f"{name}.q_norm", f"{name}.k_norm")


class Qwen3(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    attention_type = Qwen3Attention
