"""Several answers to one prompt: who waits for whom, and how beams follow each other. Pure Python.

The prompt is computed once. The first answer runs; the others wait, and then start from its blocks
(fork, with copy-on-write: arXiv 2309.06180, section 4.4).
"""

from dataclasses import dataclass

from octavo.core import FinishReason, Fork, Sequence, SequenceStatus
from octavo.scheduler.beam import BeamSearch, Hypothesis


class Siblings:
    """Answers to one prompt, each drawn for itself. Sole writer: the scheduler."""

    def __init__(self, sequences: list[Sequence]):
        self.members = sequences
        self._follow(sequences[0], sequences[1:])

    def _follow(self, first: Sequence, others: list[Sequence]) -> None:
        self.first, self.waiting = first, others
        first.fork = None
        for sequence in others:
            sequence.fork = Fork(first, first.num_prompt_tokens)

    def released(self) -> list[Sequence]:
        """Those who need not wait any longer; each is named once."""
        alive = [s for s in self.waiting if s.status is not SequenceStatus.FINISHED]
        if self.first.status is SequenceStatus.FINISHED:
            if alive:  # it ended before the prompt was computed: the next one takes its place
                self._follow(alive[0], alive[1:])
            return alive[:1]
        if self.first.num_committed_tokens < self.first.num_prompt_tokens:
            return []
        self.waiting = []
        return alive

    def ended_with(self, sequence: Sequence) -> list[Sequence]:
        """Those who must end because this one did, itself included."""
        return [sequence]


@dataclass(frozen=True, slots=True)
class Succession:
    """What a beam becomes: the parent that it goes on from, as it was, and one more token."""

    beam: Sequence
    parent: Sequence
    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int


class BeamGroup(Siblings):
    """The beams of one search. They decide together, when each live one has reported."""

    def __init__(self, sequences: list[Sequence]):
        super().__init__(sequences)
        sampling = self.first.request.sampling
        self._search = BeamSearch(
            beam_width=sampling.num_beams,
            max_tokens=self.first.max_num_tokens - self.first.num_prompt_tokens,
            stop_ids=self.first.stop_ids,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
        )
        self._live = [self.first]  # in the order of the search
        self._reports: dict[str, tuple[tuple[int, float], ...]] = {}
        for sequence in sequences:
            sequence.num_logprobs = self._search.num_candidates

    def released(self) -> list[Sequence]:
        """Nobody: a beam begins when the first decision gives it a token."""
        return []

    def ended_with(self, sequence: Sequence) -> list[Sequence]:
        return self.members

    def report(self, sequence: Sequence, candidates: tuple[tuple[int, float], ...]) -> bool:
        """A beam's likeliest next tokens; return whether all live beams have reported."""
        self._reports[sequence.id] = candidates
        return len(self._reports) == len(self._live)

    def advance(self) -> list[Succession]:
        """Decide; return what each beam that lives on becomes, or nothing when the search is over.

        A beam that goes on from itself keeps its place, so that its KV stays where it is.
        """
        reports = [self._reports[s.id] for s in self._live]
        continuations = self._search.advance(reports)
        self._reports.clear()
        parents = [self._live[c.parent] for c in continuations]
        kept = {parent.id for parent in parents}
        free = [s for s in self.members if s.id not in kept]
        successions, self._live = [], []
        for continuation, parent in zip(continuations, parents, strict=True):
            if parent.id in kept:
                kept.remove(parent.id)
                beam = parent
            else:
                beam = free.pop()
            self._live.append(beam)
            successions.append(
                Succession(
                    beam,
                    parent,
                    [*parent.token_ids, continuation.token_id],
                    parent.block_ids,
                    parent.num_computed_tokens,
                )
            )
        return successions

    def answers(self) -> list[tuple[Sequence, Hypothesis]]:
        """When the search is over: each member with one of the best, in order."""
        found = list(self._search.hypotheses)
        found += [Hypothesis((), 0.0, FinishReason.LENGTH)] * (len(self.members) - len(found))
        return list(zip(self.members, found, strict=True))
