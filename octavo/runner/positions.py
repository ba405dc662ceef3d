"""The three positions of each token of a step, told to a device that turns by them (M-RoPE).

They lie in one place for as long as the runner lives, so that CUDA graphs can read them there.
Knows rows and their images; no encoder.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.layers import SectionAngles
from octavo.models import Model
from octavo.runner.layout import StepLayout
from octavo.runner.links import Uplink
from octavo.runner.rows import Row, StepLimits
from octavo.vision import ImageSpan
from octavo.vision.positions import GridSpan, mrope_positions


class TokenPositions:
    """The way down of tokens' positions. Sole writer: the model runner."""

    def __init__(self, angles: SectionAngles, limits: StepLimits, device: str):
        most_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
        self._uplink = Uplink(3 * most_tokens, device)
        angles.told = self._uplink.device_memory

    def send(self, step: StepLayout, rows: Sequence[Row], num_tokens: int) -> None:
        """Tell where each token stands in time, down and across.

        Args:
            step: the layout of the step.
            rows: its sequences, in their order.
            num_tokens: of the pass that will run, which may be more than the step has.
        """
        words = self._uplink.next_buffer().numpy()[: 3 * num_tokens].reshape(3, num_tokens)
        lengths, count = np.diff(step.query_starts), step.query_starts[-1]
        # All three are equal in text and behind images, which move what comes after them.
        moved = [
            start - first + (_of_prompt(row)[1] if row.images else 0)
            for row, start, first in zip(rows, step.starts, step.query_starts, strict=False)
        ]
        words[:, :count] = np.arange(count) + np.repeat(moved, lengths)
        words[:, count:] = 0
        for row, start, first, length in zip(
            rows, step.starts, step.query_starts, lengths, strict=False
        ):
            if row.images and start < row.num_prompt_tokens:
                some = _of_prompt(row)[0][:, start : start + length]
                words[:, first : first + some.shape[1]] = some
        self._uplink.send(3 * num_tokens)


def create_token_positions(model: Model, limits: StepLimits, device: str) -> TokenPositions | None:
    """That of a model which turns by them."""
    return None if model.angles is None else TokenPositions(model.angles, limits, device)


def _of_prompt(row: Row) -> tuple[NDArray[np.int64], int]:
    """[3, num_prompt_tokens], and what is added to the place of a token behind them."""
    if row.grid_positions is None:
        spans = [
            GridSpan(ImageSpan(image.start, image.num_tokens), image.grid, image.frame_step)
            for image in row.images
            if image.grid is not None
        ]
        row.grid_positions = mrope_positions(row.num_prompt_tokens, spans)
    return row.grid_positions
