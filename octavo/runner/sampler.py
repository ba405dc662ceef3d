"""Applies each row's own sampling options to the step's logits, in the documented order.

Knows rows and tensors; no models. A step that no row asked for costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.core import TokenLogprobs
from octavo.kernels import sampling
from octavo.runner.rows import Row

Rows = Sequence[Row]


class Draw(NamedTuple):
    """A row's next token. Where its logits were not finite, the token means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_finite: bool


def sample(logits: Tensor, rows: Rows) -> list[Draw]:
    """logits [S, V] fp32, one row for each of `rows` -> their next tokens, in the same order."""
    wants_logprobs = any(row.num_logprobs is not None for row in rows)
    raw = logits.clone() if wants_logprobs else logits
    for step in (add_biases_and_masks, add_penalties):
        step(logits, rows)
    best, token_ids = logits.max(-1)
    finite = best.isfinite()
    drawing = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    if drawing:
        index = torch.tensor(drawing, device=logits.device)
        chosen = [rows[i] for i in drawing]
        token_ids[index] = draw_tokens(logits[index], chosen)
    logprobs = report_logprobs(raw, token_ids, rows) if wants_logprobs else [None] * len(rows)
    return [Draw(*row) for row in zip(token_ids.tolist(), logprobs, finite.tolist(), strict=True)]


def add_biases_and_masks(logits: Tensor, rows: Rows) -> None:
    """logit_bias, allowed_token_ids, and no stop token before min_tokens. In place."""
    entries: list[tuple[int, int, float]] = []
    for i, row in enumerate(rows):
        if row.sampling.allowed_token_ids is not None:
            sampling.keep_only(
                logits, i, torch.tensor(row.sampling.allowed_token_ids, device=logits.device)
            )
        if row.sampling.logit_bias:
            entries += [(i, token_id, bias) for token_id, bias in row.sampling.logit_bias.items()]
        if len(row.token_ids) < row.min_num_tokens:
            entries += [(i, token_id, sampling.NEGATIVE_INFINITY) for token_id in row.stop_ids]
    if entries:
        row_index, token_ids, bias = zip(*entries, strict=True)
        sampling.add_bias(
            logits,
            torch.tensor(row_index, device=logits.device),
            torch.tensor(token_ids, device=logits.device),
            torch.tensor(bias, dtype=logits.dtype, device=logits.device),
        )


def add_penalties(logits: Tensor, rows: Rows) -> None:
    """Presence, frequency and repetition penalties. In place."""
    for i, row in enumerate(rows):
        options = row.sampling
        if options.has_penalties:
            ids = torch.tensor(row.token_ids, device=logits.device)
            sampling.penalize(
                logits[i],
                ids[: row.num_prompt_tokens],
                ids[row.num_prompt_tokens :],
                presence=options.presence_penalty,
                frequency=options.frequency_penalty,
                repetition=options.repetition_penalty,
            )


def draw_tokens(logits: Tensor, rows: Rows) -> Tensor:
    """logits [S, V] of rows with a temperature -> token ids [S]."""

    def column(value: Callable[[Row], float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value(row) for row in rows], dtype=dtype, device=logits.device)

    logits = sampling.scale_by_temperature(logits, column(lambda row: row.sampling.temperature))
    if any(row.sampling.top_k > 0 for row in rows):
        logits = sampling.mask_top_k(logits, column(lambda row: row.sampling.top_k, torch.int64))
    if any(row.sampling.top_p < 1.0 for row in rows):
        logits = sampling.mask_top_p(logits, column(lambda row: row.sampling.top_p))
    if any(row.sampling.min_p > 0.0 for row in rows):
        logits = sampling.mask_min_p(logits, column(lambda row: row.sampling.min_p))
    uniform = sampling.philox_uniform(
        np.array([row.seed for row in rows], dtype=np.int64),
        np.array([len(row.token_ids) for row in rows], dtype=np.int64),
    )
    return sampling.draw(logits, torch.from_numpy(uniform).to(logits.device))


def report_logprobs(logits: Tensor, token_ids: Tensor, rows: Rows) -> list[TokenLogprobs | None]:
    """What the rows that asked for log-probabilities get, of the logits as the model gave them."""
    num_top = min(max(row.num_logprobs or 0 for row in rows), logits.shape[-1])
    chosen, rank, top_ids, top = (
        part.tolist() for part in sampling.token_logprobs(logits, token_ids, num_top)
    )
    return [
        TokenLogprobs(
            chosen[i],
            rank[i],
            tuple(zip(top_ids[i], top[i], strict=True))[: row.num_logprobs],
        )
        if row.num_logprobs is not None
        else None
        for i, row in enumerate(rows)
    ]
