"""OPT (arXiv 2205.01068): GPT-2's decoder under other names, and its own table of positions."""

from torch import Tensor

from octavo.config import ModelConfig
from octavo.config.families.opt import POSITION_OFFSET
from octavo.layers import Build, LearnedPositions, PlainMLP, Slot, StepContext
from octavo.models.decoder import Decoder
from octavo.models.llama import LlamaAttention, LlamaBlock

PREFIX = "model."


class OPTAttention(LlamaAttention):
    """As Llama's."""

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = {part: f"{name}.{part}_proj" for part in ("q", "k", "v")}
        return self.qkv.slots(qkv) | self.output.slots({"o": f"{name}.out_proj"})


class OPTBlock(LlamaBlock):
    """One transformer block: attention and feed-forward, each after a norm."""

    mlp: PlainMLP

    def slots(self, name: str) -> dict[str, Slot]:
        return (
            self.attention_norm.slots(f"{name}.self_attn_layer_norm")
            | self.attention.slots(f"{name}.self_attn")
            | self.mlp_norm.slots(f"{name}.final_layer_norm")
            | self.mlp.up.slots({"up": f"{name}.fc1"})
            | self.mlp.down.slots({"down": f"{name}.fc2"})
        )


class OPT(Decoder):
    """The decoder, with a vector for each position added to the embedding."""

    attention_type = OPTAttention
    block_type = OPTBlock

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__(config, build, max_positions=max_positions)
        rows = config.num_learned_positions
        self.positions = LearnedPositions(rows, config.hidden_size, build, offset=POSITION_OFFSET)

    def embed(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> what the first block reads, [T, hidden_size]."""
        return self.positions.added_to(super().embed(token_ids, context), context.positions)

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        name = f"{PREFIX}decoder"
        table = self.vocabulary.slots(f"{name}.embed_tokens", "lm_head")
        table |= self.positions.slots(f"{name}.embed_positions")
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"{name}.layers.{index}")
        return table | self.norm.slots(f"{name}.final_layer_norm")

    def slot_name(self, name: str) -> str:
        """Meta's own checkpoints leave the prefix out."""
        return name if name.startswith((PREFIX, "lm_head.")) else f"{PREFIX}{name}"
