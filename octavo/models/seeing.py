"""What a model that sees has beside its decoder: an encoder, whose rows stand among embeddings.

A base behind the language model's class, so that whatever that does to embeddings (positions that
are added, say) is done to rows of images as well.
"""

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor

from octavo.config import ModelConfig
from octavo.config.families.vision_shapes import VisionConfig
from octavo.layers import Build, Slot, StepContext
from octavo.models.decoder import Decoder
from octavo.vision.encoders import VisionEncoder, create_encoder


class Seeing(Decoder):
    """A decoder, and an encoder beside it."""

    text_prefix: ClassVar[str] = "language_model."  # of the decoder's names in checkpoints

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        self.encoder = create_encoder(cast(VisionConfig, config.vision), build)

    @property
    def image_encoder(self) -> VisionEncoder:
        return self.encoder

    def beside_encoder(self, text: Mapping[str, Slot]) -> dict[str, Slot]:
        """The table of the language model under its prefix, and the encoder's."""
        table = {f"{self.text_prefix}{name}": slot for name, slot in text.items()}
        return table | self.encoder.slots()

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> embeddings, with rows of images in their places, [T, hidden_size]."""
        return context.with_images(super().embed(token_ids, context))
