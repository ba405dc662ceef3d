"""Attention without a cache, in which every token sees every other one of its segment."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from octavo.layers import Build, Linear


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [N, T, H, D], key and value [N, S, H, D] -> [N, T, H, D], scaled by 1 / sqrt(D)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


class SelfAttention(nn.Module):
    """The projections around `attend`; names of weights are the model's business."""

    def __init__(self, hidden_size: int, num_heads: int, build: Build, *, bias: bool = True):
        super().__init__()
        self._head_dim = hidden_size // num_heads
        self.num_heads = build.group.local(num_heads, "attention heads")
        parts = dict.fromkeys(("q", "k", "v"), hidden_size)
        self.qkv = Linear(parts, hidden_size, build, bias=bias, split="rows")
        self.output = Linear({"o": hidden_size}, hidden_size, build, bias=True, split="columns")

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden_size] -> queries, keys, values, each [T, H, D]."""
        query, key, value = (
            self.qkv(x).view(x.shape[0], 3, self.num_heads, self._head_dim).unbind(1)
        )
        return query, key, value

    def forward(self, x: Tensor, num_images: int) -> Tensor:
        """x [images * tokens, hidden_size] -> the same shape; images do not see each other."""
        shape = num_images, -1, self.num_heads, self._head_dim
        query, key, value = (heads.view(shape) for heads in self.heads(x))
        y: Tensor = self.output(attend(query, key, value).flatten(2).flatten(0, 1))
        return y


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of consecutive tokens that attend to themselves alone, those of one length together."""

    rows: tuple[Tensor, ...]  # each [segments, length] int64: the places of their tokens

    @classmethod
    def of(cls, lengths: Sequence[int], device: str) -> "Segments":
        """Segments of these lengths, one after the other."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        by_length = sorted(zip(lengths, starts, strict=False))
        groups = groupby(by_length, key=lambda segment: segment[0])
        return cls(
            tuple(
                (torch.tensor([start for _, start in group])[:, None] + torch.arange(length)).to(
                    device
                )
                for length, group in groups
                if length
            )
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [T, H, D] -> [T, H, D]."""
        out = torch.empty_like(query)
        for rows in self.rows:
            out[rows] = attend(query[rows], key[rows], value[rows])
        return out
