"""An executor without a model, whose answers give away any mistake of the bookkeeping.

It keeps KV memory as a plain array of what was written in each slot. The next token is a hash of
all (position, token) pairs found through the block table, so a wrong block, a stale slot, a skipped
or repeated position changes the text from there on.
"""

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

from octavo.core import NewSequence, SampledToken, StepPlan, StepResult
from octavo.errors import IntegrityError

# What a slot may hold besides a token of the vocabulary.
_STALE = -1  # never written, or written for another position: reads as garbage
_NOT_FINITE = -2  # the model wrote NaN there


def oracle_token(token_ids: SequenceOf[int], vocab_size: int) -> int:
    """The token that must follow `token_ids`: what the executor answers if nothing went wrong."""
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def oracle_tokens(prompt: SequenceOf[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The `num_tokens` tokens that must follow a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(oracle_token(tokens, vocab_size))
    return tokens[len(prompt) :]


class _Row:
    """What the executor knows of one sequence."""

    __slots__ = ("block_ids", "num_computed_tokens", "token_ids")

    def __init__(self, new: NewSequence):
        self.token_ids = list(new.token_ids)
        self.num_computed_tokens = new.num_computed_tokens
        self.block_ids = list(new.block_ids)


class FakeExecutor:
    """Runs plans on a fake KV memory. Sole writer of its rows and slots."""

    def __init__(self, *, num_blocks: int, block_size: int = 16, vocab_size: int = 1000):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._slot_tokens = [_STALE] * (num_blocks * block_size)
        self._slot_positions = [-1] * (num_blocks * block_size)
        self._rows: dict[str, _Row] = {}

    @property
    def num_rows(self) -> int:
        """Sequences that the executor has been told of and not told to forget."""
        return len(self._rows)

    def execute(self, plan: StepPlan) -> StepResult:
        for sequence_id in plan.dropped:
            self._rows.pop(sequence_id, None)
        for new in plan.new:
            if new.sequence_id in self._rows:
                raise IntegrityError(f"{new.sequence_id} was introduced twice")
            self._rows[new.sequence_id] = _Row(new)
        sampled = []
        for share in plan.scheduled:
            row = self._rows[share.sequence_id]
            row.block_ids.extend(share.new_block_ids)
            self._write(row, share.num_tokens)
            if share.samples:
                sampled.append(self._sample(share.sequence_id, row))
        return StepResult(plan.step, tuple(sampled))

    def poison(self, sequence_id: str, num_tokens: int) -> None:
        """The KV of the last `num_tokens` computed tokens of a sequence is NaN after all.

        Whoever reads it, through whichever block table, gets logits that are not finite.
        """
        row = self._rows[sequence_id]
        for position in range(row.num_computed_tokens - num_tokens, row.num_computed_tokens):
            self._slot_tokens[self._slot(row, position)] = _NOT_FINITE

    def _sample(self, sequence_id: str, row: _Row) -> SampledToken:
        tokens = self._read(row)
        if _NOT_FINITE in tokens:
            return SampledToken(sequence_id, _STALE, error="the logits are not finite")
        token_id = oracle_token(tokens, self.vocab_size)
        row.token_ids.append(token_id)
        return SampledToken(sequence_id, token_id)

    def _slot(self, row: _Row, position: int) -> int:
        block_id = row.block_ids[position // self.block_size]
        return block_id * self.block_size + position % self.block_size

    def _write(self, row: _Row, num_tokens: int) -> None:
        for position in range(row.num_computed_tokens, row.num_computed_tokens + num_tokens):
            slot = self._slot(row, position)
            self._slot_tokens[slot] = row.token_ids[position]
            self._slot_positions[slot] = position
        row.num_computed_tokens += num_tokens

    def _read(self, row: _Row) -> list[int]:
        """Token ids as the KV memory has them; a slot of another position reads as garbage."""
        tokens: list[int] = []
        for start in range(0, row.num_computed_tokens, self.block_size):
            stop = min(start + self.block_size, row.num_computed_tokens)
            slot = self._slot(row, start)
            found = self._slot_tokens[slot : slot + stop - start]
            positions = self._slot_positions[slot : slot + stop - start]
            expected = list(range(start, stop))
            if positions != expected:
                pairs = zip(found, positions, expected, strict=True)
                found = [token if at == wanted else _STALE for token, at, wanted in pairs]
            tokens += found
        return tokens
