"""A plan's shares as the numbers that a packet carries. Host only; knows rows, no tensors' device.

The one pass over a step's sequences in Python, so it is written for speed.
"""

from dataclasses import dataclass

import numpy as np

from octavo.core import ScheduledTokens
from octavo.kernels import KNOWN_TO_THE_DEVICE
from octavo.runner.packet import Packet, StepSizes
from octavo.runner.reads import NO_READS, StepReads
from octavo.runner.rows import Row, Rows
from octavo.runner.stages import StepBounds


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The B sequences and T tokens of a step, and the S draws from it, in the order of the plan."""

    row_indices: list[int]  # [B]
    starts: list[int]  # [B]: tokens in the cache before the step
    query_starts: list[int]  # [B+1]
    token_ids: list[int]  # [T]
    draw_index: list[int]  # [S]: the token that each draw follows
    draw_positions: list[int]  # [S]: where the drawn token will stand
    draw_row_indices: list[int]  # [S]
    draw_rows: list[Row]  # [S]; a draft's is the row as if it and those before it were right
    bounds: StepBounds
    reads: StepReads = NO_READS

    @property
    def sizes(self) -> StepSizes:
        """What the packet must have room for."""
        num_draws, num_reads = len(self.draw_rows), len(self.reads.index)
        return StepSizes(len(self.row_indices), len(self.token_ids), num_draws, num_reads)

    def write(self, packet: Packet, rows: Rows) -> None:
        """Fill a packet that is at least as large; what it has more is nobody's."""
        _, num_tokens, num_samples, num_reads = self.sizes
        shares, draws = packet.shares, packet.draws
        for section, values, filler in (
            (shares.rows, self.row_indices, rows.nobody),
            (shares.starts, self.starts, 0),
            (shares.query_starts, self.query_starts, num_tokens),
            (draws.plain.positions, self.draw_positions, 0),
            (draws.index, self.draw_index + self.reads.index if num_reads else self.draw_index, 0),
        ):
            numbers = section.numpy()
            numbers[: len(values)] = values
            numbers[len(values) :] = filler
        shares.token_ids.numpy()[:num_tokens] = self.token_ids
        indices = draws.rows.numpy()
        indices[:num_samples] = self.draw_row_indices
        indices[num_samples:] = rows.nobody
        rows.options.gather(indices, draws.plain)

    def truncates(self, rows: Rows) -> bool:
        """Whether some draw is from a part of the vocabulary only."""
        return bool(np.any(rows.options.truncates[self.draw_row_indices]))


def lay_out(shares: tuple[ScheduledTokens, ...], rows: list[Row]) -> StepLayout:
    """Lay a step out; `rows` are those of the shares, in their order."""
    starts: list[int] = []
    query_starts = [0]
    token_ids: list[int] = []
    draw_index: list[int] = []
    draw_positions: list[int] = []
    draw_rows: list[Row] = []
    max_query_len = max_context_len = 0
    for share, row in zip(shares, rows, strict=True):
        start, num_tokens = row.num_computed_tokens, share.num_tokens
        stop = start + num_tokens
        drafts = share.draft_ids
        starts.append(start)
        if num_tokens == 1:  # as nearly always
            known = row.token_ids
            token_ids.append(known[start] if start < len(known) else KNOWN_TO_THE_DEVICE)
        else:
            known = row.token_ids[start : stop - len(drafts)]
            token_ids += known
            token_ids += [KNOWN_TO_THE_DEVICE] * (num_tokens - len(known) - len(drafts))
            token_ids += drafts
        query_starts.append(len(token_ids))
        if share.samples and not drafts:
            draw_index.append(len(token_ids) - 1)
            draw_positions.append(stop)
            draw_rows.append(row)
        elif share.samples:
            for i in range(len(drafts) + 1):
                draw_index.append(len(token_ids) - 1 - len(drafts) + i)
                draw_positions.append(stop - len(drafts) + i)
                draw_rows.append(row.with_tokens(drafts[:i]) if i else row)
        max_query_len = max(max_query_len, num_tokens)
        max_context_len = max(max_context_len, stop)
    return StepLayout(
        [row.index for row in rows],
        starts,
        query_starts,
        token_ids,
        draw_index,
        draw_positions,
        [row.index for row in draw_rows],
        draw_rows,
        StepBounds(max_query_len, max_context_len),
    )
