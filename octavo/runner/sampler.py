"""What some rows ask for around the draw, in the documented order: steps on logits, and reports.

Knows rows and tensors; no models. A step that no row asked for costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.core import TokenLogprobs
from octavo.kernels import sampling
from octavo.runner.rows import Row

Rows = Sequence[Row]


class Drawn(NamedTuple):
    """The next token of each of S rows; negative where there is none."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


def sample(logits: Tensor, rows: Rows, draw: Callable[[Tensor], Tensor]) -> Drawn:
    """logits [S, V], one row for each of `rows` -> their next tokens, in the same order.

    `draw` takes logits, fp32 here, to token ids [S].
    """
    logits = logits.float()
    wants_logprobs = any(row.num_logprobs is not None for row in rows)
    raw = logits.clone() if wants_logprobs else logits
    for step in (add_biases_and_masks, add_penalties, keep_shapes):
        step(logits, rows)
    token_ids = draw(logits)
    if not wants_logprobs:
        return Drawn(token_ids.tolist())
    return Drawn(token_ids.tolist(), report_logprobs(raw, token_ids.clamp(min=0), rows))


def add_biases_and_masks(logits: Tensor, rows: Rows) -> None:
    """logit_bias, allowed_token_ids, bad_words, no stop token before min_tokens. In place."""
    entries: list[tuple[int, int, float]] = []
    for i, row in enumerate(rows):
        if row.sampling.allowed_token_ids is not None:
            sampling.keep_only(
                logits, i, torch.tensor(row.sampling.allowed_token_ids, device=logits.device)
            )
        if row.sampling.logit_bias:
            entries += [(i, token_id, bias) for token_id, bias in row.sampling.logit_bias.items()]
        if row.banned:
            output = row.token_ids[row.num_prompt_tokens :]
            for *before, last in row.banned:
                if not before or output[-len(before) :] == before:
                    entries.append((i, last, sampling.NEGATIVE_INFINITY))
        if row.num_tokens < row.min_num_tokens:
            entries += [(i, token_id, sampling.NEGATIVE_INFINITY) for token_id in row.stop_ids]
    if entries:
        row_index, token_ids, bias = zip(*entries, strict=True)
        sampling.add_bias(
            logits,
            torch.tensor(row_index, device=logits.device),
            torch.tensor(token_ids, device=logits.device),
            torch.tensor(bias, dtype=logits.dtype, device=logits.device),
        )


def keep_shapes(logits: Tensor, rows: Rows) -> None:
    """Only what an answer's shape lets follow. In place; nothing is left where it has an error."""
    matchers = [(i, row, row.matcher) for i, row in enumerate(rows) if row.matcher is not None]
    if not matchers:
        return
    masks = torch.zeros((len(matchers), -(-logits.shape[-1] // 32)), dtype=torch.int32)
    for mask, (_, row, matcher) in zip(masks, matchers, strict=True):
        new_ids = row.token_ids[row.num_matched_tokens :]
        if new_ids:
            matcher.accept(new_ids)
            row.num_matched_tokens += len(new_ids)
        if not matcher.error:
            matcher.write_mask(mask.data_ptr(), mask.nbytes)
        if matcher.error:
            mask.zero_()
    index = torch.tensor([i for i, _, _ in matchers])
    sampling.keep_bits(logits, index.to(logits.device), masks.to(logits.device))


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
