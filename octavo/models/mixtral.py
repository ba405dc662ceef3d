"""Mixtral (arXiv 2401.04088): Llama's decoder, with a mixture of experts in every block.

Only its checkpoint names: `octavo.models.llama` has the wiring.
"""

from octavo.layers import MixtureOfExperts, Slot
from octavo.models.llama import Llama, LlamaBlock


class MixtralBlock(LlamaBlock):
    """As Llama's, but for the names of what is in its mixture."""

    mlp: MixtureOfExperts

    def mlp_slots(self, name: str) -> dict[str, Slot]:
        return self.mlp.slots(f"{name}.block_sparse_moe", ("w1", "w3", "w2"))


class Mixtral(Llama):
    """Embedding, blocks, norm, head, as Llama's."""

    block_type = MixtralBlock
