"""Rotary position embedding (arXiv 2104.09864), with the ways in which checkpoints stretch it."""

import math

import torch
from torch import Tensor

from octavo.config import Rope, RopeScaling
from octavo.layers.build import Build


def rotary_frequencies(rope: Rope) -> Tensor:
    """Radians a token for each pair of dimensions, [rotary_dim / 2], fp32."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


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


class Rotary:
    """The table of angles, one for all layers that turn alike. `Attention` rotates by it."""

    def __init__(self, rope: Rope, max_positions: int, build: Build):
        angles = torch.outer(torch.arange(max_positions).float(), rotary_frequencies(rope))
        # [max_positions, rotary_dim] fp32: cosines of all pairs, then sines
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(build.device)
