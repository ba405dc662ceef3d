"""What a device must be told of a step, in one piece of memory, so that one copy carries it all.

Owns the layout. Knows neither plans nor models.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels import DrawOptions, StepShares

ALIGNMENT = 4  # words; 16 bytes, so that kernels may read whole vectors


class StepSizes(NamedTuple):
    """How many of each a step has room for."""

    num_seqs: int
    num_tokens: int
    num_samples: int
    num_reads: int = 0  # hidden states that are wanted, and not to draw from

    @property
    def num_wanted(self) -> int:
        """Hidden states that come out of the model."""
        return self.num_samples + self.num_reads


def _aligned(num_words: int) -> int:
    return -(-num_words // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Draws:
    """Which tokens yield logits, and how S tokens are drawn from them."""

    plain: DrawOptions  # those of every row, for a step in which none truncates
    truncating: DrawOptions  # the same columns
    rows: Tensor  # [S] int32: the row that each drawn token belongs to
    # [S] int32: the token of the step whose hidden state each is drawn from; behind them, where the
    # packet has room for them, those whose hidden states are wanted for something else
    index: Tensor

    def first(self, num_samples: int) -> "Draws":
        """Only so many of them."""
        if num_samples == len(self.rows):
            return self
        columns = {
            f.name: getattr(self.plain, f.name)[:num_samples]
            for f in fields(DrawOptions)
            if f.name != "truncates"
        }
        return Draws(
            DrawOptions(**columns, truncates=False),
            DrawOptions(**columns, truncates=True),
            self.rows[:num_samples],
            self.index[:num_samples],
        )


@dataclass(frozen=True, slots=True)
class Packet:
    """Views of one stretch of 32-bit words: the same on both sides of the copy.

    Where the draws lie depends on their number alone, so that whoever draws need not know the rest.
    """

    words: Tensor  # [num_words] int32: all of it
    draws: Draws
    shares: StepShares

    @staticmethod
    def num_words(sizes: StepSizes) -> int:
        """Words that a step of these sizes takes."""
        return sum(map(_aligned, _lengths(sizes)))

    @classmethod
    def over(cls, memory: Tensor, sizes: StepSizes) -> "Packet":
        """The packet at the beginning of `memory` [at least num_words] int32."""
        sections, start = [], 0
        for length in _lengths(sizes):
            sections.append(memory[start : start + length])
            start += _aligned(length)
        seeds, positions, temperature, top_p, min_p, top_k, rows, index = sections[:8]
        columns = {
            "temperature": temperature.view(torch.float32),
            "top_k": top_k,
            "top_p": top_p.view(torch.float32),
            "min_p": min_p.view(torch.float32),
            "seeds": seeds.view(torch.int64),
            "positions": positions.view(torch.int64),
        }
        plain, truncating = (DrawOptions(**columns, truncates=on) for on in (False, True))
        draws = Draws(plain, truncating, rows, index)
        return cls(memory[:start], draws, StepShares(*sections[8:]))


class Packets:
    """Packets that were laid out before: to make a dozen views anew takes longer than to fill them.

    Steps come in few sizes where graphs have them, or nothing but decodes runs.
    """

    MOST = 512

    def __init__(self) -> None:
        self._known: dict[tuple[int, StepSizes], Packet] = {}

    def over(self, memory: Tensor, sizes: StepSizes) -> Packet:
        """As `Packet.over`. The memory must live as long as this."""
        key = memory.data_ptr(), sizes
        packet = self._known.get(key)
        if packet is None:
            if len(self._known) >= self.MOST:
                self._known.clear()
            packet = self._known[key] = Packet.over(memory, sizes)
        return packet


def _lengths(sizes: StepSizes) -> tuple[int, ...]:
    """Words of each section, in their order."""
    num_seqs, num_tokens, num_samples, _ = sizes
    draws = (2 * num_samples,) * 2 + (num_samples,) * 5
    return (*draws, sizes.num_wanted, num_seqs, num_seqs, num_seqs + 1, num_tokens)
