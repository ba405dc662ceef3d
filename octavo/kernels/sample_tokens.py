"""From logits to token ids in one op: temperature → top-k → top-p → min-p → draw.

Owns the op over whole columns of options. The steps themselves, and what comes before them (biases,
masks, penalties), are in `sampling`. Does not know which request a row belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import sampling
from octavo.kernels.dispatch import Op
from octavo.kernels.native.support import refuse
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """What each of S rows asks for, as columns on the logits' device."""

    temperature: Tensor  # [S] fp32; 0 takes the likeliest token
    top_k: Tensor  # [S] int32; 0 keeps all
    top_p: Tensor  # [S] fp32 in (0, 1]
    min_p: Tensor  # [S] fp32 in [0, 1]
    seeds: Tensor  # [S] int64
    positions: Tensor  # [S] int64: where the drawn token will stand in its sequence
    truncates: bool  # some row has a top-k, top-p or min-p

    def __post_init__(self) -> None:
        floats = (self.temperature, self.top_p, self.min_p)
        longs = (self.seeds, self.positions)
        columns = (*floats, *longs, self.top_k)
        if (
            any(column.dtype is not torch.float32 for column in floats)
            or any(column.dtype is not torch.int64 for column in longs)
            or self.top_k.dtype is not torch.int32
            or any(column.shape != self.seeds.shape for column in columns)
            or any(column.dim() != 1 or not column.is_contiguous() for column in columns)
        ):
            rule = "columns are [S] fp32, top_k int32, seeds and positions int64, contiguous"
            raise refuse("sample_tokens", rule, temperature=self.temperature, seeds=self.seeds)


class SampleTokens(Protocol):
    def __call__(self, logits: Tensor, options: DrawOptions) -> tuple[Tensor, Tensor]:
        """logits [S, V], bf16, fp16 or fp32 with dense rows -> token ids [S] int64, is_finite [S].

        Rows may be strided. All steps work on the logits' values in fp32, so a row of bf16 draws
        what the same numbers in fp32 would. is_finite is bool.
        A token depends on its row's logits, seed and position alone: it inverts the cumulative
        distribution at the uniform number of (seed, position), as `sampling.draw` does. Where the
        largest logit is not a finite number, or one is NaN, is_finite is false and the token means
        nothing, but is an id of the vocabulary.
        """
        ...


def reference_sample_tokens(logits: Tensor, options: DrawOptions) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    best, token_ids = logits.max(-1)
    drawing = options.temperature.nonzero().squeeze(1)  # greedy rows are done
    if len(drawing):
        kept = sampling.scale_by_temperature(logits[drawing], options.temperature[drawing])
        if options.truncates:
            kept = sampling.mask_top_k(kept, options.top_k[drawing])
            kept = sampling.mask_top_p(kept, options.top_p[drawing])
            kept = sampling.mask_min_p(kept, options.min_p[drawing])
        uniform = sampling.philox_uniform(
            options.seeds[drawing].cpu().numpy(), options.positions[drawing].cpu().numpy()
        )
        token_ids[drawing] = sampling.draw(kept, torch.from_numpy(uniform).to(logits.device))
    return token_ids, best.isfinite()


SAMPLE_TOKENS: Op[SampleTokens] = Op("sample_tokens", reference_sample_tokens)
SAMPLE_TOKENS.register_module(
    "triton", "octavo.kernels.triton_sample_tokens:triton_sample_tokens", unsupported_by_triton
)
