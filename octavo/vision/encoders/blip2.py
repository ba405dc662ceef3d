"""BLIP-2 (arXiv 2301.12597), and MiniGPT-4 after it: the EVA tower, a Q-Former, a projection.

Only wiring and checkpoint names.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from octavo.config.families.vision_shapes import Blip2VisionConfig, ViTConfig
from octavo.layers import Build, LayerNorm, Linear, Slot
from octavo.vision.encoders.attention import images_of
from octavo.vision.encoders.base import VisionEncoder
from octavo.vision.encoders.qformer import QFormer
from octavo.vision.encoders.vit import PatchEmbedding, ViTBlock
from octavo.vision.processing import EncoderInput

NAMES = {
    "patch": "patch_embedding",
    "class": "class_embedding",
    "positions": "position_embedding",
}


class EvaTower(nn.Module):
    """The vision transformer of EVA-CLIP (arXiv 2211.07636), its class token included."""

    def __init__(self, config: ViTConfig, build: Build):
        super().__init__()
        self.embedding = PatchEmbedding(config, build, bias=True)
        self._blocks = [ViTBlock(config, build) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(self._blocks)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, build)

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        table = self.embedding.slots(f"{name}.embeddings", NAMES, nested=1)
        for index, block in enumerate(self._blocks):
            layer = f"{name}.encoder.layers.{index}"
            table |= block.slots(layer)
            table |= block.attention.qkv.fused_slots(f"{layer}.self_attn.qkv")
            table |= block.attention.output.slots({"o": f"{layer}.self_attn.projection"})
        return table | self.norm.slots(f"{name}.post_layernorm")

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, side, side] -> [N * (1 + patches), hidden_size]."""
        x: Tensor = self.embedding(images).flatten(0, 1)
        segments = images_of(len(images), len(x), x.device)
        residual: Tensor | None = None
        for block in self._blocks:
            x, residual = block(x, residual, segments)
        x, _ = self.norm(x, residual)
        return x


class Blip2Encoder(VisionEncoder):
    """As many tokens for each image as there are queries."""

    def __init__(self, config: Blip2VisionConfig, build: Build):
        super().__init__(build)
        self.tower = EvaTower(config.tower, build)
        self.qformer = QFormer(config.qformer, config.tower.hidden_size, build)
        width = config.qformer.hidden_size
        self.projection = Linear({"out": config.out_hidden_size}, width, build, bias=True)

    def slots(self) -> dict[str, Slot]:
        """As VisionEncoder."""
        return (
            self.tower.slots("vision_model")
            | self.qformer.slots("qformer", "query_tokens")
            | self.projection.slots({"out": "language_projection"})
        )

    def forward(self, inputs: Sequence[EncoderInput]) -> list[Tensor]:
        """As VisionEncoder."""
        images = self.values_of(inputs)
        tokens = self.projection(self.qformer(self.tower(images), len(images)))
        return list(tokens.view(len(images), -1, tokens.shape[-1]))
