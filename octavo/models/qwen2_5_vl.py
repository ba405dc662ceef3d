"""Qwen2.5-VL (arXiv 2502.13923): Qwen2's decoder under M-RoPE, with rows of images in it.

Only wiring and checkpoint names: `octavo.layers` has the rotation, `octavo.vision` the tower.
"""

from torch import Tensor

from octavo.config import ModelConfig
from octavo.layers import Build, SectionAngles, SectionedAttention, StepContext
from octavo.models.llama import LlamaAttention
from octavo.models.llava import Llava


class Qwen25VLAttention(LlamaAttention):
    """As Llama's, turned by three positions."""

    attend_type = SectionedAttention


class Qwen25VL(Llava):
    """The decoder, and an encoder beside it."""

    attention_type = Qwen25VLAttention
    text_prefix = ""
    angles: SectionAngles

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        [rope] = config.ropes
        self.angles = SectionAngles(self._rotary[rope], rope.sections)

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones [S, hidden_size]."""
        return super().forward(token_ids, self.angles.turned(context))
