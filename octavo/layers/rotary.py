"""Rotary position embedding (arXiv 2104.09864), with the ways in which checkpoints stretch it."""

import math

import torch
from torch import Tensor

from octavo.config import Rope, RopeScaling
from octavo.layers.build import Build


def rotary_frequencies(rope: Rope, max_positions: int) -> Tensor:
    """Radians a token for each pair of dimensions, [rotary_dim / 2], fp32.

    Args:
        rope: what turns, and how it is stretched.
        max_positions: of the longest sequence that the engine takes: "longrope" asks.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    waves = rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / waves
    if scaling.kind == "linear":
        return 1.0 / waves / scaling.factor
    if scaling.kind == "llama3":
        return _llama3_frequencies(1.0 / waves, scaling)
    if scaling.kind == "yarn":
        return _yarn_frequencies(waves, rope, scaling)
    is_long = max_positions > scaling.original_max_position_embeddings
    return 1.0 / (torch.tensor(scaling.long_factors if is_long else scaling.short_factors) * waves)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's stretch: long waves by `factor`, short ones not at all, a ramp between them."""
    original_len = scaling.original_max_position_embeddings
    wave_lens = 2 * math.pi / frequencies
    longest_kept = original_len / scaling.high_freq_factor
    shortest_stretched = original_len / scaling.low_freq_factor
    ramp = (original_len / wave_lens - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    stretched = torch.where(wave_lens > shortest_stretched, frequencies / scaling.factor, blended)
    return torch.where(wave_lens < longest_kept, frequencies, stretched)


def _yarn_frequencies(waves: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK-by-parts": a ramp over the dimensions, from those kept to those stretched."""

    def dimension_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    first = dimension_that_turns(scaling.beta_fast)
    last = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    last = last if last != first else last + 0.001  # transformers' way around a ramp of no length
    dimensions = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    kept = 1 - ((dimensions - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * waves) * (1 - kept) + 1.0 / waves * kept


class Rotary:
    """The table of angles, one for all layers that turn alike. `Attention` rotates by it."""

    def __init__(self, rope: Rope, max_positions: int, build: Build):
        frequencies = rotary_frequencies(rope, max_positions)
        angles = torch.outer(torch.arange(max_positions).float(), frequencies)
        # [max_positions, rotary_dim] fp32: cosines of all pairs, then sines
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        if rope.scaling is not None:
            cos_sin *= rope.scaling.attention_factor
        self.cos_sin = cos_sin.to(build.device)
