"""LLaVA (arXiv 2304.08485, 2310.03744): Llama's decoder, with rows of images among its tokens.

Only wiring and checkpoint names: `octavo.vision.encoders` has what looks at images.
"""

from octavo.layers import Slot
from octavo.models.llama import Llama
from octavo.models.seeing import Seeing
from octavo.vision.encoders import current_name


class Llava(Llama, Seeing):
    """The decoder, and an encoder beside it."""

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        return self.beside_encoder(super().slots())

    def slot_name(self, name: str) -> str:
        """The name in `slots` of a tensor as a checkpoint has it: old ones have longer names."""
        return current_name(name)
