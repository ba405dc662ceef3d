"""LLaVA (arXiv 2304.08485, 2310.03744): Llama's decoder, with rows of images among its tokens.

Only wiring and checkpoint names: `octavo.vision.encoders` has what looks at images.
"""

from typing import ClassVar, cast

from torch import Tensor

from octavo.config import ModelConfig
from octavo.config.families.vision_shapes import VisionConfig
from octavo.layers import Build, Slot, StepContext
from octavo.models.llama import Llama
from octavo.vision.encoders import VisionEncoder, create_encoder, current_name


class Llava(Llama):
    """The decoder, and an encoder beside it."""

    text_prefix: ClassVar[str] = "language_model."

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        self.encoder = create_encoder(cast(VisionConfig, config.vision), build)

    @property
    def image_encoder(self) -> VisionEncoder:
        return self.encoder

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        table = {f"{self.text_prefix}{name}": slot for name, slot in super().slots().items()}
        return table | self.encoder.slots()

    def slot_name(self, name: str) -> str:
        """The name in `slots` of a tensor as a checkpoint has it: old ones have longer names."""
        return current_name(name)

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> what the first block reads, [T, hidden_size]."""
        return context.with_images(super().embed(token_ids, context))
