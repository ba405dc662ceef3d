"""BERT (arXiv 1810.04805): an encoder, whose blocks have their norms behind each half.

Only wiring and checkpoint names. What it makes of a prompt is read from its hidden states, or by
its head of classes; it has no head over the vocabulary.
"""

from typing import ClassVar, cast

from torch import Tensor, nn

from octavo.config import MLPConfig, ModelConfig
from octavo.errors import IntegrityError
from octavo.layers import (
    Build,
    ClassHead,
    EncoderAttention,
    LearnedPositions,
    Linear,
    PlainMLP,
    Slot,
    StepContext,
    TypedTokens,
    residual_norm,
)
from octavo.models.base import Model


class BertBlock(nn.Module):
    """Attention, then feed-forward, each added to what it read and normed (post-LN)."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__()
        shape, hidden_size = config.layers[layer].attention, config.hidden_size
        self.head_dim = shape.head_dim
        parts = dict.fromkeys(("query", "key", "value"), shape.num_query_values)
        self.qkv = Linear(parts, hidden_size, build, bias=shape.bias, split="rows")
        self.attend = EncoderAttention(shape.num_heads, shape.head_dim, build, scale=shape.scale)
        self.output = Linear(
            {"o": hidden_size},
            shape.num_query_values,
            build,
            bias=shape.output_bias,
            split="columns",
        )
        self.attention_norm = residual_norm(config, build)
        self.mlp = PlainMLP(cast(MLPConfig, config.layers[layer].mlp), hidden_size, build)
        self.mlp_norm = residual_norm(config, build)

    def slots(self, name: str) -> dict[str, Slot]:
        qkv = {part: f"{name}.attention.self.{part}" for part in ("query", "key", "value")}
        return (
            self.qkv.slots(qkv)
            | self.output.slots({"o": f"{name}.attention.output.dense"})
            | self.attention_norm.slots(f"{name}.attention.output.LayerNorm")
            | self.mlp.slots(name, "intermediate.dense", "output.dense")
            | self.mlp_norm.slots(f"{name}.output.LayerNorm")
        )

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x [T, hidden_size] -> that of the wanted tokens; x is written over."""
        # What is not needed any more has no name, so that its memory is free for what comes next.
        heads = (3, -1, self.head_dim)  # of queries, keys, values
        y = self.attend(*self.qkv(x).unflatten(-1, heads).unbind(1), context.segments).flatten(1)
        y, x = context.wanted_of(self.output(y), x)
        y, x = self.attention_norm(y, x)
        normed: Tensor = self.mlp_norm(self.mlp(y), y)[0]
        return normed


class Bert(Model):
    """The encoder: tokens, their types and positions, a norm, blocks; perhaps a head of classes."""

    prefix: ClassVar = "bert."
    num_skipped_positions: ClassVar = 0
    head_names: ClassVar = ("pooler.dense", "classifier")

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__()
        self.tokens = TypedTokens(config, build)
        self.positions = LearnedPositions(
            config.num_learned_positions,
            config.hidden_size,
            build,
            offset=self.num_skipped_positions,
        )
        self.norm = residual_norm(config, build)
        blocks = [BertBlock(config, layer, build) for layer in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self._blocks, self._kinds = blocks, config.layers
        head = config.class_head
        self.head = None if head is None else ClassHead(head, config.hidden_size, build)

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them."""
        table = self.tokens.slots("embeddings.word_embeddings", "embeddings.token_type_embeddings")
        table |= self.positions.slots("embeddings.position_embeddings")
        table |= self.norm.slots("embeddings.LayerNorm")
        for index, block in enumerate(self._blocks):
            table |= block.slots(f"encoder.layer.{index}")
        return table if self.head is None else table | self.head.slots(*self.head_names)

    def slot_name(self, name: str) -> str | None:
        """Without the prefix of models with a head; old checkpoints call a norm's tensors so."""
        name = name.removeprefix(self.prefix)
        if self.head is None and name.startswith(("pooler.", "cls.", "lm_head.")):
            return None
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones [S, hidden_size]."""
        x = self.positions.added_to(self.tokens.embed(token_ids), context.positions)
        x = self.norm(x)[0]
        *blocks, last = self._blocks
        of_all = context.of_all()
        for block in blocks:
            x = block(x, of_all)
        hidden: Tensor = last(x, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> scores [S, num_classes]."""
        if self.head is None:
            raise IntegrityError("a model without a head was asked for scores")
        scores: Tensor = self.head(hidden)
        return scores
