"""From logits to token ids: one function for each step of the documented order.

    bias and masks → penalties → temperature → top-k → top-p → min-p → draw

All functions see tensors and scalars only; S rows of V logits, fp32. Who wants which step for which
row is `runner`'s business. Randomness is counter-based: a draw depends on (seed, position) and on
the row's own logits, never on its neighbours or on what was drawn before.
"""

import numpy as np
import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")
NUCLEUS_CANDIDATES = 1024  # tried before a full sort: nearly every nucleus is smaller

_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """logits[rows[i], token_ids[i]] += bias[i], in place; -inf bans a token."""
    logits.index_put_((rows, token_ids), bias, accumulate=True)


def keep_only(logits: Tensor, row: int, token_ids: Tensor) -> None:
    """Ban everything but `token_ids` in one row, in place."""
    kept = logits[row, token_ids]
    logits[row].fill_(NEGATIVE_INFINITY)
    logits[row, token_ids] = kept


def keep_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Ban what is not in `bits` [R, V / 32] int32 in `rows` [R], in place.

    Bit i % 32 of word i // 32 stands for token i.
    """
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    kept = (bits[:, :, None] >> places & 1).bool().flatten(1)[:, : logits.shape[-1]]
    logits[rows] = logits[rows].masked_fill(~kept, NEGATIVE_INFINITY)


def penalize(
    row_logits: Tensor,
    prompt_ids: Tensor,
    output_ids: Tensor,
    *,
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    """Penalties of one row [V], in place.

    repetition (CTRL, arXiv 1909.05858, section 4.1) touches tokens of prompt and output; presence
    and frequency (OpenAI) touch those of the output.
    """
    if repetition != 1.0:
        seen = torch.cat((prompt_ids, output_ids)).unique()
        values = row_logits[seen]
        row_logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if output_ids.numel() and (presence != 0.0 or frequency != 0.0):
        generated, counts = output_ids.unique(return_counts=True)
        row_logits[generated] -= presence + frequency * counts


def scale_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [S, V] / temperature [S]; temperatures are positive."""
    return logits / temperature[:, None]


def mask_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Keep the top_k [S] likeliest of each row (ties at the edge are kept); 0 keeps all."""
    limit = int(top_k.max())
    if limit <= 0:
        return logits
    largest = logits.topk(min(limit, logits.shape[-1]), dim=-1).values
    edge = largest.gather(1, (top_k.clamp(1, largest.shape[-1]) - 1)[:, None])
    edge = edge.masked_fill((top_k <= 0)[:, None], NEGATIVE_INFINITY)
    return logits.masked_fill(logits < edge, NEGATIVE_INFINITY)


def mask_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities reach top_p [S].

    Nucleus sampling, arXiv 1904.09751, section 3.1. Ties at the edge are kept.
    """
    probabilities = logits.softmax(-1)
    largest = probabilities.topk(min(NUCLEUS_CANDIDATES, logits.shape[-1]), dim=-1).values
    if bool((largest.sum(-1) < top_p).any()):
        largest = probabilities.sort(dim=-1, descending=True).values
    before = largest.cumsum(-1) - largest  # probability of everything likelier
    num_kept = (before < top_p[:, None]).sum(-1).clamp(min=1)
    edge = largest.gather(1, (num_kept - 1)[:, None])
    return logits.masked_fill(probabilities < edge, NEGATIVE_INFINITY)


def mask_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Keep tokens at least min_p [S] times as likely as the likeliest (arXiv 2407.01082)."""
    edge = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
    return logits.masked_fill(logits < edge, NEGATIVE_INFINITY)


def philox_uniform(
    seeds: np.ndarray[tuple[int], np.dtype[np.int64]],
    positions: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uniform numbers in [0, 1), one for each (seed, position), both [S].

    Philox 4x32-10 (Salmon et al., SC11, section 3.3) with the seed as key and the position as
    counter; 53 bits of the first two words make the number.
    """
    key = seeds.astype(np.uint64)
    keys = [key & _LOW_32, key >> _SHIFT_32]
    counter = positions.astype(np.uint64)
    words = [
        counter & _LOW_32,
        counter >> _SHIFT_32,
        np.zeros_like(counter),
        np.zeros_like(counter),
    ]
    for _ in range(10):
        first = words[0] * _PHILOX_MULTIPLIERS[0]
        second = words[2] * _PHILOX_MULTIPLIERS[1]
        words = [
            (second >> _SHIFT_32) ^ words[1] ^ keys[0],
            second & _LOW_32,
            (first >> _SHIFT_32) ^ words[3] ^ keys[1],
            first & _LOW_32,
        ]
        keys = [(keys[i] + _PHILOX_WEYL[i]) & _LOW_32 for i in (0, 1)]
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token id [S] a row by inverting the cumulative distribution at uniform [S] in [0, 1)."""
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, target, right=True)
        .squeeze(1)
        .clamp(max=logits.shape[-1] - 1)
    )


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of drawn tokens [S] and of the likeliest, of the untouched logits [S, V].

    Returns logprob [S], rank [S] (1 = likeliest), top ids [S, num_top], top logprobs [S, num_top].
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > chosen).sum(-1) + 1
    top = logprobs.topk(num_top, dim=-1)
    return chosen.squeeze(1), rank, top.indices, top.values
