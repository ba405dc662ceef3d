"""What steps make of prompts besides draws: scores of their tokens, and vectors. Pure Python."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

from octavo.core import FINISHED, Reading, Sequence


def take_readings(
    readings: Iterable[Reading], shares: SequenceOf[tuple[Sequence, int]], step: int
) -> Iterator[tuple[Sequence, str]]:
    """Give each sequence what was read for it; yield those that failed, with the reason.

    shares: the sequences of the step, with how often each had been preempted when it was planned.
        Scores hold whatever became of the sequence since: they are told once, and the KV that they
        came of is as good as any. A vector ends the life that it belongs to, and no other.
    """
    of_step = {sequence.id: (sequence, life) for sequence, life in shares}
    for reading in readings:
        sequence, life = of_step[reading.sequence_id]
        if sequence.status is FINISHED or step < sequence.valid_from_step:
            continue
        if reading.error is not None:
            yield sequence, reading.error
            continue
        if reading.scores:
            sequence.take_scores(reading.start, reading.scores)
        if sequence.num_preemptions == life:
            sequence.vector = reading.vector
