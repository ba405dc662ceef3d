"""DeepSeek-V2-Lite (arXiv 2405.04434): Llama's blocks, with latent attention and experts.

Only wiring and checkpoint names: `octavo.layers.latent_attention` has the attention.
"""

from typing import cast

from torch import Tensor, nn

from octavo.config import LatentAttentionConfig, ModelConfig
from octavo.layers import Build, LatentAttention, Rotary, Slot, StepContext
from octavo.models.llama import Llama


class DeepseekV2Attention(nn.Module):
    """Latent attention under DeepSeek's names."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, *, rotary: Rotary):
        super().__init__()
        shape = cast(LatentAttentionConfig, config.layers[layer].attention)
        self.attend = LatentAttention(shape, layer, config.hidden_size, build, rotary=rotary)

    def slots(self, name: str) -> dict[str, Slot]:
        return self.attend.slots(
            {
                "query": f"{name}.q_proj",
                "latent": f"{name}.kv_a_proj_with_mqa",
                "norm": f"{name}.kv_a_layernorm",
                "heads": f"{name}.kv_b_proj",
                "output": f"{name}.o_proj",
            }
        )

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        y: Tensor = self.attend(x, context)
        return y


class DeepseekV2(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    attention_type = DeepseekV2Attention  # type: ignore[assignment]
