"""What is made of prompts' hidden states besides draws: scores of their tokens, and vectors.

Scoring a token is one more wanted position, whose logits are held against the token that does
follow. Knows hidden states and logits; no models and no device memory but its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.core import NewSequence, Reading, ScheduledTokens, TokenLogprobs
from octavo.kernels import sampling
from octavo.runner.pooler import Pooler, create_pooler

NOT_FINITE = "the model's output was not a finite number"


class Scorer:
    """Scores one prompt's tokens after the first, each once."""

    def __init__(self, new: NewSequence, num_top: int):
        self.token_ids = new.token_ids[: new.num_prompt_tokens]
        self.num_top = num_top
        self._next = new.num_scored_tokens  # the position whose hidden state is wanted next

    def wanted(self, start: int, stop: int) -> range:
        """The positions of a share that tell of a token which has no score yet."""
        positions = range(max(start, self._next), min(stop, len(self.token_ids) - 1))
        self._next = max(self._next, positions.stop)
        return positions

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to score."""
        return self._next >= len(self.token_ids) - 1


Reader = Scorer | Pooler


def create_reader(new: NewSequence) -> Reader | None:
    """What reads a new sequence's hidden states, where anything but draws does."""
    if new.pooling is not None:
        return create_pooler(new.pooling, new.num_prompt_tokens)
    if new.num_prompt_logprobs is not None:
        return Scorer(new, new.num_prompt_logprobs)
    return None


class _Scored(NamedTuple):
    sequence_id: str
    scorer: Scorer
    positions: range


class _Pooled(NamedTuple):
    sequence_id: str
    pooler: Pooler
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepReads:
    """The R hidden states of a step that are read, those to be scored before the others."""

    index: list[int] = field(default_factory=list)  # [R]: tokens of the step
    scored: list[_Scored] = field(default_factory=list)
    pooled: list[_Pooled] = field(default_factory=list)


NO_READS = StepReads()


def lay_out_reads(
    shares: Sequence[ScheduledTokens],
    starts: Sequence[int],
    query_starts: Sequence[int],
    readers: dict[str, Reader],
) -> StepReads:
    """What `readers`, by sequence, want of a step; `starts` and `query_starts` as in its layout.

    A scorer that is done is taken out, so that steps without readers never come here.
    """
    to_score: list[int] = []
    to_pool: list[int] = []
    reads = StepReads()
    for share, start, first in zip(shares, starts, query_starts, strict=False):
        reader = readers.get(share.sequence_id)
        if reader is None:
            continue
        positions = reader.wanted(start, start + share.num_tokens)
        if isinstance(reader, Scorer) and reader.is_done:
            del readers[share.sequence_id]
        if not positions:
            continue
        places = range(first + positions.start - start, first + positions.stop - start)
        if isinstance(reader, Scorer):
            to_score += places
            reads.scored.append(_Scored(share.sequence_id, reader, positions))
        else:
            to_pool += places
            reads.pooled.append(_Pooled(share.sequence_id, reader, len(places)))
    reads.index.extend(to_score + to_pool)
    return reads


def read(
    hidden: Tensor, reads: StepReads, *, logits: Callable[[Tensor], Tensor], num_at_once: int
) -> Callable[[], tuple[Reading, ...]]:
    """hidden [R, hidden_size] -> what was read of it, which waits for the device when it is asked.

    Logits of at most `num_at_once` hidden states are held at a time.
    """
    num_scored = sum(len(one.positions) for one in reads.scored)
    scores = _score(hidden[:num_scored], reads.scored, logits, num_at_once)
    vectors, place = [], num_scored
    for pooled in reads.pooled:
        vectors.append(pooled.pooler.read(hidden[place : place + pooled.num_tokens], logits))
        place += pooled.num_tokens
    return lambda: (
        *_score_readings(reads.scored, scores),
        *_vector_readings(reads.pooled, vectors),
    )


def _score(
    hidden: Tensor, scored: Sequence[_Scored], logits: Callable[[Tensor], Tensor], num_at_once: int
) -> list[tuple[Tensor, ...]]:
    """Log-probabilities of the tokens that follow, on the device, in parts of `num_at_once`."""
    if not scored:
        return []
    following = [
        token_id
        for _, scorer, positions in scored
        for token_id in scorer.token_ids[positions.start + 1 : positions.stop + 1]
    ]
    token_ids = torch.tensor(following, device=hidden.device)
    num_top = max(scorer.num_top for _, scorer, _ in scored)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(hidden), num_at_once):
        part = slice(start, start + num_at_once)
        of_part = logits(hidden[part]).float()
        num_known = min(num_top, of_part.shape[-1])
        parts.append(sampling.token_logprobs(of_part, token_ids[part], num_known))
    return parts


def _score_readings(scored: Sequence[_Scored], parts: list[tuple[Tensor, ...]]) -> list[Reading]:
    if not scored:
        return []
    chosen, ranks, top_ids, tops = (
        torch.cat(column).tolist() for column in zip(*parts, strict=True)
    )
    readings, place = [], 0
    for sequence_id, scorer, positions in scored:
        places = range(place, place + len(positions))
        place = places.stop
        if not all(isfinite(chosen[i]) for i in places):
            readings.append(Reading(sequence_id, error=NOT_FINITE))
            continue
        scores = tuple(
            TokenLogprobs(
                chosen[i],
                ranks[i],
                tuple(zip(top_ids[i], tops[i], strict=True))[: scorer.num_top],
            )
            for i in places
        )
        readings.append(Reading(sequence_id, positions.start + 1, scores))
    return readings


def _vector_readings(pooled: Sequence[_Pooled], vectors: Sequence[Tensor | None]) -> list[Reading]:
    readings = []
    for (sequence_id, _, _), vector in zip(pooled, vectors, strict=True):
        if vector is None:
            continue
        on_host = vector.cpu()
        if bool(on_host.isfinite().all()):
            readings.append(Reading(sequence_id, vector=on_host.numpy().tobytes()))
        else:
            readings.append(Reading(sequence_id, error=NOT_FINITE))
    return readings
