"""BLIP-2 (arXiv 2301.12597): OPT's decoder, with what a Q-Former read of images before its tokens.

Only wiring and checkpoint names: `octavo.vision.encoders` has the tower and the Q-Former. With
Llama's decoder, as MiniGPT-4 (arXiv 2304.10592) has it, the wiring is that of LLaVA.
"""

from octavo.config import ModelConfig
from octavo.layers import Build, Slot
from octavo.models.llava import Llava
from octavo.models.opt import OPT
from octavo.models.seeing import Seeing


class Blip2OPT(OPT, Seeing):
    """The decoder, and an encoder beside it."""

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        return self.beside_encoder(super().slots())

    def slot_name(self, name: str) -> str:
        """All checkpoints have transformers' names."""
        return name


def create_blip2(config: ModelConfig, build: Build, *, max_positions: int) -> Seeing:
    """With OPT, which adds learned positions to embeddings, or with Llama, which turns by them."""
    model = Blip2OPT if config.num_learned_positions else Llava
    return model(config, build, max_positions=max_positions)
