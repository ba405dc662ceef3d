"""The Q-Former (arXiv 2301.12597, section 3.1): learned queries that read an image.

BERT's layers, their norms behind them, with a cross-attention to the image in some.
"""

import torch
from torch import Tensor, nn

from octavo.config.families.vision_shapes import QFormerConfig
from octavo.kernels import Segments
from octavo.layers import Build, EncoderAttention, LayerNorm, Linear, PlainMLP, Slot
from octavo.vision.encoders.attention import SelfAttention, images_of


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, config: QFormerConfig, image_width: int, build: Build):
        super().__init__()
        size = config.hidden_size
        self.attend = EncoderAttention(config.num_heads, size // config.num_heads, build)
        self.query = Linear({"q": size}, size, build, bias=True, split="rows")
        self.key_value = Linear({"k": size, "v": size}, image_width, build, bias=True, split="rows")
        self.output = Linear({"o": size}, size, build, bias=True, split="columns")

    def forward(self, x: Tensor, image: Tensor, queries: Segments, patches: Segments) -> Tensor:
        """x [images * queries, hidden], image [images * patches, width] -> as x."""
        dim = self.attend.head_dim
        query = self.query(x).unflatten(-1, (-1, dim))
        key, value = self.key_value(image).unflatten(-1, (2, -1, dim)).unbind(1)
        y: Tensor = self.output(self.attend(query, key, value, queries, patches).flatten(1))
        return y


class QFormerLayer(nn.Module):
    """Queries attend to each other, then perhaps to the image, then each goes through an MLP."""

    def __init__(self, config: QFormerConfig, image_width: int, build: Build, *, crosses: bool):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention = SelfAttention(size, config.num_heads, build)
        self.attention_norm = LayerNorm(size, eps, build)
        self.cross = CrossAttention(config, image_width, build) if crosses else None
        self.cross_norm = LayerNorm(size, eps, build) if crosses else None
        self.mlp = PlainMLP(config.mlp, size, build)
        self.mlp_norm = LayerNorm(size, eps, build)

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        table = self.attention.qkv.slots(_names(f"{name}.attention", "query", "key", "value"))
        table |= _output_slots(self.attention.output, self.attention_norm, f"{name}.attention")
        if self.cross is not None and self.cross_norm is not None:
            crossing = f"{name}.crossattention"
            table |= self.cross.query.slots(_names(crossing, "query"))
            table |= self.cross.key_value.slots(_names(crossing, "key", "value"))
            table |= _output_slots(self.cross.output, self.cross_norm, crossing)
        table |= self.mlp.slots(name, "intermediate_query.dense", "output_query.dense")
        return table | self.mlp_norm.slots(f"{name}.output_query.LayerNorm")

    def forward(self, x: Tensor, image: Tensor, queries: Segments, patches: Segments) -> Tensor:
        """x [images * queries, hidden], image [images * patches, width] -> as x."""
        x, _ = self.attention_norm(self.attention(x, queries), x)
        if self.cross is not None and self.cross_norm is not None:
            x, _ = self.cross_norm(self.cross(x, image, queries, patches), x)
        x, _ = self.mlp_norm(self.mlp(x), x)
        return x


class QFormer(nn.Module):
    """The queries and their layers."""

    def __init__(self, config: QFormerConfig, image_width: int, build: Build):
        super().__init__()
        self.queries = torch.empty(
            config.num_queries, config.hidden_size, dtype=build.dtype, device=build.device
        )
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, build)
        self._layers = [
            QFormerLayer(
                config, image_width, build, crosses=index % config.cross_attention_every == 0
            )
            for index in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(self._layers)

    def slots(self, name: str, queries_name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        queries = self.queries
        table = self.norm.slots(f"{name}.layernorm")
        table[queries_name] = Slot((1, *queries.shape), lambda tensor: queries.copy_(tensor[0]))
        for index, layer in enumerate(self._layers):
            table |= layer.slots(f"{name}.encoder.layer.{index}")
        return table

    def forward(self, image: Tensor, num_images: int) -> Tensor:
        """image [images * patches, width] -> [images * queries, hidden_size]."""
        x: Tensor = self.norm(self.queries.repeat(num_images, 1))[0]
        queries, patches = (images_of(num_images, len(rows), x.device) for rows in (x, image))
        for layer in self._layers:
            x = layer(x, image, queries, patches)
        return x


def _names(name: str, *parts: str) -> dict[str, str]:
    return {part[0]: f"{name}.attention.{part}" for part in parts}


def _output_slots(output: Linear, norm: LayerNorm, name: str) -> dict[str, Slot]:
    dense = output.slots({"o": f"{name}.output.dense"})
    return dense | norm.slots(f"{name}.output.LayerNorm")
