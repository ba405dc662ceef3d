"""A plan's share of each row, laid out as the tensors of one forward pass. Knows no models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.core import ScheduledTokens
from octavo.kernels import AttentionBatch
from octavo.runner.rows import Row


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens of B sequences, packed one sequence after the other."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    attention: AttentionBatch
    sample_index: Tensor  # [S] int64: the tokens whose hidden states yield logits
    sample_rows: list[Row]  # the S rows they belong to; a draft's has the drafts before it


def prepare_inputs(
    shares: tuple[ScheduledTokens, ...], rows: list[Row], *, block_size: int, device: str
) -> StepInputs:
    """Pack the scheduled tokens of `rows` (in the order of `shares`)."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts = [0]
    sample_index: list[int] = []
    sample_rows: list[Row] = []
    for share, row in zip(shares, rows, strict=True):
        start, stop = row.num_computed_tokens, row.num_computed_tokens + share.num_tokens
        token_ids += row.token_ids[start:stop]  # ends where the drafts, if there are any, begin
        token_ids += share.draft_ids
        positions += range(start, stop)
        slots += [
            row.block_ids[position // block_size] * block_size + position % block_size
            for position in range(start, stop)
        ]
        query_starts.append(len(token_ids))
        if share.samples:
            num_drafts = len(share.draft_ids)
            sample_index += range(len(token_ids) - 1 - num_drafts, len(token_ids))
            sample_rows.append(row)
            sample_rows += [row.with_tokens(share.draft_ids[: i + 1]) for i in range(num_drafts)]
    context_lens = [
        row.num_computed_tokens + share.num_tokens for share, row in zip(shares, rows, strict=True)
    ]
    attention = AttentionBatch(
        query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=_block_tables(rows, context_lens, block_size).to(device),
        max_query_len=max(share.num_tokens for share in shares),
        max_context_len=max(context_lens),
    )
    return StepInputs(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        attention=attention,
        sample_index=torch.tensor(sample_index, dtype=torch.int64, device=device),
        sample_rows=sample_rows,
    )


def _block_tables(rows: list[Row], context_lens: list[int], block_size: int) -> Tensor:
    """[B, W] int32, padded with block 0, which no kernel reads beyond a row's context."""
    width = -(-max(context_lens) // block_size)
    padded = [(row.block_ids + [0] * width)[:width] for row in rows]
    return torch.tensor(padded, dtype=torch.int32)
