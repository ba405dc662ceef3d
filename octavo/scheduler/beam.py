"""Beam search as arithmetic: which beams go on, which are finished, and when the search is over.

Owns the scores and the tokens of one search. Does not know sequences, KV blocks or the model: the
caller computes the live beams, hands in what each of them found likeliest, and lets the KV follow
from parent to child.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from octavo.core import FinishReason
from octavo.errors import IntegrityError


class Continuation(NamedTuple):
    """A live beam of the next step: a beam of this step, by its index, and one more token."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. Its token ids are the generated ones, the stop id that ended it included."""

    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0  # of all its tokens together

    def grown(self, token_id: int, logprob: float) -> "_Beam":
        return _Beam((*self.token_ids, token_id), logprob)


class BeamSearch:
    """One beam search. Sole writer: the group of sequences that it belongs to.

    The rule is that of transformers' `generate(num_beams=beam_width)`. In each step, every live
    beam with every possible next token is a candidate, ranked by the sum of its tokens' natural-log
    probabilities. Of the `beam_width` best candidates, those that end in a stop id are finished; a
    worse one that ends so is dropped. The `beam_width` best that do not end so live on. The step
    that reaches `max_tokens` finishes its `beam_width` best candidates, whatever they end in. A
    hypothesis scores

        score = (sum of log-probabilities) / (number of generated tokens) ** length_penalty

    where the stop id counts in both, so that a positive penalty favours long answers. The
    `beam_width` best hypotheses are kept. Once there are as many, the search is over when

        early_stopping is True: at once;
        False: the best live beam, scored as if it ended now, is no better than the worst of them.
            A heuristic where `length_penalty` > 0: the beam might still have grown better;
        "never": nor could it become better by `max_tokens`. This one is exact.

    Ties go to the older hypothesis, to the better parent, and to the token that was reported first.

    transformers adds and divides in fp32; this is double precision. Scores agree to fp32's
    rounding, and two candidates closer than that (about 1e-7 of the sum) may rank differently; so
    may exact ties, whose order `torch.topk` leaves open. It also marks what is not there by a score
    of -1e9, which shows where there are fewer candidates than beams (here, fewer beams live) or
    where scores are as low as that.
    """

    def __init__(
        self,
        *,
        beam_width: int,
        max_tokens: int,
        stop_ids: frozenset[int],
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ):
        self.beam_width = beam_width
        self.max_tokens = max_tokens  # generated ones
        self.stop_ids = stop_ids
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self._beams = [_Beam()]  # all beams of the first step would be the same: one is enough
        self._hypotheses: list[Hypothesis] = []

    @property
    def num_candidates(self) -> int:
        """How many of its likeliest tokens a beam has to report; all, where there are fewer.

        Even if one beam supplied the whole next step and knew every stop id among its likeliest,
        `beam_width` others would be left. transformers takes more, and never uses the rest.
        """
        return self.beam_width + len(self.stop_ids)

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The best finished beams so far, at most `beam_width`, best first."""
        return tuple(self._hypotheses)

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Continuation]:
        """Decide a step, and return the beams of the next one, best first; none when it is over.

        candidates: for each live beam, in the order of the last answer, its `num_candidates`
            likeliest tokens as (token id, log-probability), likeliest first. The first step has
            one beam. A log-probability of -inf is a token that is masked out.

        The answer has `beam_width` beams, or fewer if there are not as many ways to go on.

        Raises:
            IntegrityError: not every live beam was reported, or the search was over already.
        """
        if not self._beams or len(candidates) != len(self._beams):
            raise IntegrityError(
                f"beam search: {len(candidates)} beams reported, but {len(self._beams)} are live"
            )
        is_last = len(self._beams[0].token_ids) + 1 == self.max_tokens
        beams: list[_Beam] = []
        continuations: list[Continuation] = []
        finished: list[Hypothesis] = []
        for rank, (logprob, parent, token_id) in enumerate(self._ranked(candidates)):
            stops = token_id in self.stop_ids
            if stops or is_last:
                if rank < self.beam_width:
                    beam = self._beams[parent].grown(token_id, logprob)
                    finished.append(self._finished(beam, stops))
            elif len(beams) < self.beam_width:
                beams.append(self._beams[parent].grown(token_id, logprob))
                continuations.append(Continuation(parent, token_id))
        best_first = sorted(self._hypotheses + finished, key=lambda found: -found.score)
        self._hypotheses = best_first[: self.beam_width]
        self._beams = [] if self._is_over(beams) else beams
        return continuations if self._beams else []

    def _ranked(
        self, candidates: Sequence[Sequence[tuple[int, float]]]
    ) -> list[tuple[float, int, int]]:
        """All candidates as (sum of log-probabilities, parent, token id), best first."""
        pool = [
            (beam.logprob + logprob, parent, token_id)
            for parent, beam in enumerate(self._beams)
            for token_id, logprob in candidates[parent]
            if logprob > -math.inf
        ]
        return sorted(pool, key=lambda candidate: -candidate[0])

    def _finished(self, beam: _Beam, stops: bool) -> Hypothesis:
        reason = FinishReason.STOP if stops else FinishReason.LENGTH
        return Hypothesis(beam.token_ids, self._score(beam, len(beam.token_ids)), reason)

    def _is_over(self, beams: list[_Beam]) -> bool:
        """True where none of these live beams, best first, could change the hypotheses."""
        if not beams:
            return True
        if len(self._hypotheses) < self.beam_width:
            return False
        if self.early_stopping is True:
            return True
        # A sum of log-probabilities only falls; a length that grows can make up for it.
        can_grow = self.early_stopping == "never" and self.length_penalty > 0
        num_tokens = self.max_tokens if can_grow else len(beams[0].token_ids)
        return self._score(beams[0], num_tokens) <= self._hypotheses[-1].score

    def _score(self, beam: _Beam, num_tokens: int) -> float:
        return beam.logprob / math.pow(num_tokens, self.length_penalty)
