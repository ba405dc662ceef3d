"""The projections around attention in which every token sees every other one of its segment."""

import torch
from torch import Tensor, nn

from octavo.kernels import Segments
from octavo.layers import Build, EncoderAttention, Linear


class SelfAttention(nn.Module):
    """Queries, keys and values of one sequence; names of weights are the model's business."""

    def __init__(self, hidden_size: int, num_heads: int, build: Build, *, bias: bool = True):
        super().__init__()
        self.attend = EncoderAttention(num_heads, hidden_size // num_heads, build)
        parts = dict.fromkeys(("q", "k", "v"), hidden_size)
        self.qkv = Linear(parts, hidden_size, build, bias=bias, split="rows")
        self.output = Linear({"o": hidden_size}, hidden_size, build, bias=True, split="columns")

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden_size] -> queries, keys, values, each [T, H, D]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.attend.head_dim)).unbind(1)
        return query, key, value

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """x [T, hidden_size] -> the same shape; segments do not see each other."""
        y: Tensor = self.output(self.attend(*self.heads(x), segments).flatten(1))
        return y


def images_of(num_images: int, num_rows: int, device: str | torch.device) -> Segments:
    """Segments of as many rows each, one an image."""
    return Segments.of([num_rows // num_images] * num_images, device)
