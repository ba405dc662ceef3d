"""Attention without a cache and without a mask: tokens see all of their own segment.

Owns the op and `Segments`. Keys and values are kept nowhere, so there are no blocks. Prompts of
encoders are segments, and so are images, their windows, and the queries that read an image. Does
not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from octavo.kernels import triton_support
from octavo.kernels.dispatch import Case, Op

MOST_DIM = 256  # of a head, in Triton: a tile stays in the registers of one program


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of consecutive rows, one after the other."""

    starts: Tensor  # [B+1] int32: segment b is rows starts[b]:starts[b+1]
    max_len: int  # known to the host: no segment is longer

    @classmethod
    def of(cls, lengths: Sequence[int], device: str | torch.device) -> Self:
        """Segments of these lengths, from row 0 on."""
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(starts.to(device), max(lengths, default=0))


class EncoderAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Segments,
        keys: Segments,
        scale: float,
    ) -> Tensor:
        """query [T, H, D], key and value [S, H, D], one dtype -> [T, H, D], contiguous.

        Inputs may be strided views. Queries of a segment see all keys of the segment of the same
        number, of which there is one at least (arXiv 1706.03762, section 3.2.1). Where tokens see
        each other, both are the same segments. Scores and softmax are in fp32. What becomes of rows
        in no segment is not said.
        """
        ...


def reference_encoder_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Segments, keys: Segments, scale: float
) -> Tensor:
    """One segment after the other, so that nothing is padded and no segment touches another."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Both wait for the device.
    rows_of = _slices(queries)
    seen_by = rows_of if keys is queries else _slices(keys)
    for mine, seen in zip(rows_of, seen_by, strict=True):
        q, k, v = (
            rows[None, part].transpose(1, 2)
            for rows, part in ((query, mine), (key, seen), (value, seen))
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out[mine] = attended[0].transpose(0, 1)
    return out


def _slices(segments: Segments) -> list[slice]:
    bounds = segments.starts.tolist()
    return [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]


def _unsupported_by_triton(case: Case) -> str | None:
    if (dim := case.sizes.get("head_dim", 0)) > MOST_DIM:
        return f"made for head sizes up to {MOST_DIM}, not {dim}"
    return triton_support.unsupported(case)


ENCODER_ATTENTION: Op[EncoderAttention] = Op("encoder_attention", reference_encoder_attention)
ENCODER_ATTENTION.register_module(
    "triton",
    "octavo.kernels.triton_encoder_attention:triton_encoder_attention",
    _unsupported_by_triton,
)
