"""Attention of whole prompts to themselves. Knows heads; no caches, no requests, no weights."""

from typing import Any

import torch
from torch import Tensor

from octavo.config import AttentionConfig
from octavo.kernels import ENCODER_ATTENTION, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.context import StepContext


class EncoderAttention(Layer):
    """Each token of a step attends to all of its sequence, which must be in the step as a whole."""

    def __init__(self, config: AttentionConfig, build: Build):
        super().__init__()
        self.num_heads = build.group.local(config.num_heads, "attention heads")
        sizes = {"num_heads": self.num_heads, "head_dim": config.head_dim}
        self._choice = ENCODER_ATTENTION.select(build.case(sizes))
        self._attend = self._choice.function
        self._scale = config.scale

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self._choice,)

    def forward(self, heads: Tensor, context: StepContext) -> Tensor:
        """heads [T, 3 H, D]: queries, keys, values, as one product makes them -> [T, H, D]."""
        query, key, value = torch.split(heads, self.num_heads, 1)
        return self._attend(query, key, value, context.attention.query_starts, self._scale)
