"""Qwen2.5-VL's vision tower (arXiv 2502.13923, section 2.1.1): images of any size, and videos.

Only wiring and checkpoint names.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from octavo.config import MLPConfig
from octavo.config.families.vision_shapes import Qwen25VisionConfig
from octavo.kernels import Segments
from octavo.layers import Build, GatedMLP, Linear, RMSNorm, Slot
from octavo.vision.encoders.attention import SelfAttention
from octavo.vision.encoders.base import VisionEncoder
from octavo.vision.encoders.projector import Projector
from octavo.vision.encoders.vit import patch_slots
from octavo.vision.encoders.windows import PatchLayout
from octavo.vision.processing import EncoderInput

NORM_EPS = 1e-6  # the reference's constant; no config has it


class Qwen25Block(nn.Module):
    """Attention within segments and a gated MLP, each after a norm."""

    def __init__(self, config: Qwen25VisionConfig, build: Build):
        super().__init__()
        size = config.hidden_size
        self.attention_norm = RMSNorm(size, NORM_EPS, build)
        self.attention = SelfAttention(size, config.num_heads, build)
        self.mlp_norm = RMSNorm(size, NORM_EPS, build)
        self.mlp = GatedMLP(config.mlp, size, build)

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        return (
            self.attention_norm.slots(f"{name}.norm1")
            | self.attention.qkv.fused_slots(f"{name}.attn.qkv")
            | self.attention.output.slots({"o": f"{name}.attn.proj"})
            | self.mlp_norm.slots(f"{name}.norm2")
            | self.mlp.slots(f"{name}.mlp")
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, layout: PatchLayout, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """x and the residual stream [patches, hidden_size] -> what is added to it, it."""
        x, residual = self.attention_norm(x, residual)
        query, key, value = self.attention.heads(x)
        turned = layout.rotated(query), layout.rotated(key)
        heads = self.attention.attend(*turned, value, segments)
        x, residual = self.mlp_norm(self.attention.output(heads.flatten(1)), residual)
        return self.mlp(x), residual


class Qwen25VisionEncoder(VisionEncoder):
    """Patches, blocks, and a merger that makes one token of neighbours."""

    def __init__(self, config: Qwen25VisionConfig, build: Build):
        super().__init__(build)
        self._config = config
        side, depth = config.patch_size, config.temporal_patch_size
        self._kernel = config.hidden_size, 3, depth, side, side
        self.patches = Linear({"patch": config.hidden_size}, config.patch_values, build)
        self._blocks = [Qwen25Block(config, build) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(self._blocks)
        self.norm = RMSNorm(config.hidden_size, NORM_EPS, build)
        unit_size = config.hidden_size * config.merge_size**2
        merger = MLPConfig(unit_size, bias=True, activation="gelu", gated=False)
        self.merger = Projector(merger, build, in_size=unit_size, out_size=config.out_hidden_size)

    def slots(self) -> dict[str, Slot]:
        """As VisionEncoder."""
        table = patch_slots(self.patches, "visual.patch_embed.proj", self._kernel)
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"visual.blocks.{index}")
        table |= self.norm.slots("visual.merger.ln_q")
        return table | self.merger.slots("visual.merger.mlp.0", "visual.merger.mlp.2")

    def forward(self, inputs: Sequence[EncoderInput]) -> list[Tensor]:
        """As VisionEncoder."""
        layout = PatchLayout.of([one.grid for one in inputs], self._config, self._device)
        unit = self._config.merge_size**2
        x = self.patches(self.values_of(inputs))
        x = x.view(-1, unit, x.shape[-1])[layout.units].flatten(0, 1)
        residual: Tensor | None = None
        for index, block in enumerate(self._blocks):
            whole = index in self._config.full_layers
            x, residual = block(x, residual, layout, layout.frames if whole else layout.windows)
        x, _ = self.norm(x, residual)
        tokens = self.merger(x.view(len(layout.units), -1))[layout.back]
        return list(tokens.split([one.num_tokens for one in inputs]))
