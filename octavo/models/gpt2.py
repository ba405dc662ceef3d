"""GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), and DistilGPT-2.

Llama's blocks with the norms and the MLP that its config names, and learned positions instead of
rotations. Its checkpoints store every matrix transposed (Conv1D).
"""

from torch import Tensor

from octavo.config import ModelConfig
from octavo.layers import Build, LearnedPositions, PlainMLP, Slot, StepContext
from octavo.models.decoder import Decoder
from octavo.models.llama import LlamaAttention, LlamaBlock

PREFIX = "transformer."


class GPT2Attention(LlamaAttention):
    """As Llama's, with one tensor for three projections."""

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = self.qkv.fused_slots(f"{name}.c_attn", transposed=True)
        return qkv | self.output.fused_slots(f"{name}.c_proj", transposed=True)


class GPT2Block(LlamaBlock):
    """One transformer block: attention and feed-forward, each after a norm."""

    mlp: PlainMLP

    def slots(self, name: str) -> dict[str, Slot]:
        return (
            self.attention_norm.slots(f"{name}.ln_1")
            | self.attention.slots(f"{name}.attn")
            | self.mlp_norm.slots(f"{name}.ln_2")
            | self.mlp.slots(f"{name}.mlp", "c_fc", "c_proj", transposed=True)
        )


class GPT2(Decoder):
    """The decoder, with a vector for each position added to the embedding."""

    attention_type = GPT2Attention
    block_type = GPT2Block

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        self.positions = LearnedPositions(config.num_learned_positions, config.hidden_size, build)

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        return self.positions.added_to(self.vocabulary.embed(token_ids), context.positions)

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        table = self.vocabulary.slots(f"{PREFIX}wte", "lm_head")
        table |= self.positions.slots(f"{PREFIX}wpe")
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"{PREFIX}h.{index}")
        return table | self.norm.slots(f"{PREFIX}ln_f")

    def slot_name(self, name: str) -> str:
        """OpenAI's own checkpoints leave the prefix out."""
        outside = name.startswith((PREFIX, "lm_head."))
        return name if outside else f"{PREFIX}{name}"
