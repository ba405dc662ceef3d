"""Attention of whole prompts to themselves: each token sees its own sequence, before and behind it.

Owns the op. Keys and values are those of the step and are kept nowhere, so there is no cache and
there are no blocks. Does not know requests.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from octavo.kernels.dispatch import Op


class EncoderAttention(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, scale: float
    ) -> Tensor:
        """query, key, value [T, H, D] (strided views allowed), one dtype -> [T, H, D], contiguous.

        query_starts [B+1] int32: sequence b owns rows query_starts[b]:query_starts[b+1], and its
        tokens see all of those (arXiv 1706.03762, section 3.2.3). Scores and softmax are in fp32.
        """
        ...


def reference_encoder_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    """One sequence after the other, so that nothing is padded and no sequence touches another."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    bounds = query_starts.tolist()  # waits for the device
    for start, stop in zip(bounds, bounds[1:], strict=False):
        q, k, v = (rows[None, start:stop].transpose(1, 2) for rows in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out[start:stop] = attended[0].transpose(0, 1)
    return out


ENCODER_ATTENTION: Op[EncoderAttention] = Op("encoder_attention", reference_encoder_attention)
