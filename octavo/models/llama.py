"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783), and what copied its wiring: SmolLM2, TinyLlama.

Only wiring and checkpoint names: layers carry sharding, weight formats, caches and kernels. A model
that differs in its attention alone names another in the place of `attention_type`, and one whose
blocks differ in more a `block_type`. Whether a block has experts is its config's to say.
"""

from typing import ClassVar

from torch import Tensor, nn

from octavo.config import ModelConfig
from octavo.layers import (
    Attention,
    Build,
    Linear,
    QKNorm,
    Rotary,
    Slot,
    StepContext,
    feed_forward,
    residual_norm,
)
from octavo.models.decoder import Decoder


class LlamaAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    attend_type: ClassVar[type[Attention]] = Attention

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        build: Build,
        *,
        rotary: Rotary | None,
        qk_norm: QKNorm | None = None,
    ):
        super().__init__()
        shape = config.layers[layer].attention
        self.head_dim = shape.head_dim
        self.qkv = Linear(
            {"q": shape.num_query_values, "k": shape.num_key_values, "v": shape.num_key_values},
            config.hidden_size,
            build,
            bias=shape.bias,
            split="rows",
        )
        self.attend = self.attend_type(shape, layer, build, rotary=rotary, qk_norm=qk_norm)
        self.output = Linear(
            {"o": config.hidden_size},
            shape.num_query_values,
            build,
            bias=shape.output_bias,
            split="columns",
        )

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = {part: f"{name}.{part}_proj" for part in ("q", "k", "v")}
        return self.qkv.slots(qkv) | self.output.slots({"o": f"{name}.o_proj"})

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = self.attend.parts_of(heads)
        y: Tensor = self.output(self.attend(query, key, value, context).flatten(1))
        return y


class LlamaBlock(nn.Module):
    """One transformer block: attention and feed-forward, each after a norm."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, attention: LlamaAttention):
        super().__init__()
        self.attention_norm = residual_norm(config, build)
        self.attention = attention
        self.mlp_norm = residual_norm(config, build)
        self.mlp = feed_forward(config.layers[layer].mlp, config.hidden_size, build)

    def slots(self, name: str) -> dict[str, Slot]:
        return (
            self.attention_norm.slots(f"{name}.input_layernorm")
            | self.attention.slots(f"{name}.self_attn")
            | self.mlp_norm.slots(f"{name}.post_attention_layernorm")
            | self.mlp_slots(name)
        )

    def mlp_slots(self, name: str) -> dict[str, Slot]:
        return self.mlp.slots(f"{name}.mlp")

    def forward(
        self, x: Tensor, residual: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, context)
        x, residual = context.wanted_of(x, residual)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


class Llama(Decoder):
    """The decoder with these blocks, under Llama's names."""

    attention_type: ClassVar[type[LlamaAttention]] = LlamaAttention
    block_type: ClassVar[type[LlamaBlock]] = LlamaBlock

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        table = self.vocabulary.slots("model.embed_tokens", "lm_head")
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"model.layers.{index}")
        return table | self.norm.slots("model.norm")
