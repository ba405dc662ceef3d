"""An executor without a model, whose answers give away any mistake of the bookkeeping.

It keeps KV memory as a plain array of what was written in each slot. The next token is a hash of
all (position, token) pairs found through the block table, so a wrong block, a stale slot, a skipped
or repeated position changes the text from there on.
"""

import hashlib
from collections.abc import Sequence as SequenceOf

from octavo.core import NewSequence, SampledToken, StepPlan, StepResult
from octavo.errors import IntegrityError


def oracle_token(token_ids: SequenceOf[int], vocab_size: int) -> int:
    """The token that must follow `token_ids`: what the executor answers if nothing went wrong."""
    text = ",".join(f"{position}:{token}" for position, token in enumerate(token_ids))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def oracle_tokens(prompt: SequenceOf[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The `num_tokens` tokens that must follow a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(oracle_token(tokens, vocab_size))
    return tokens[len(prompt) :]


class _Row:
    """What the executor knows of one sequence."""

    def __init__(self, new: NewSequence):
        self.token_ids = list(new.token_ids)
        self.num_computed_tokens = new.num_computed_tokens
        self.block_ids = list(new.block_ids)


class FakeExecutor:
    """Runs plans on a fake KV memory. Sole writer of its rows and slots."""

    def __init__(self, *, num_blocks: int, block_size: int = 16, vocab_size: int = 1000):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
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
                token_id = oracle_token(self._read(row), self.vocab_size)
                row.token_ids.append(token_id)
                sampled.append(SampledToken(share.sequence_id, token_id))
        return StepResult(plan.step, tuple(sampled))

    def _slot(self, row: _Row, position: int) -> int:
        block_id = row.block_ids[position // self.block_size]
        return block_id * self.block_size + position % self.block_size

    def _write(self, row: _Row, num_tokens: int) -> None:
        for position in range(row.num_computed_tokens, row.num_computed_tokens + num_tokens):
            self._slots[self._slot(row, position)] = (position, row.token_ids[position])
        row.num_computed_tokens += num_tokens

    def _read(self, row: _Row) -> list[int]:
        """Token ids as the KV memory has them; a slot of another position reads as garbage."""
        tokens = []
        for position in range(row.num_computed_tokens):
            found = self._slots[self._slot(row, position)]
            tokens.append(found[1] if found is not None and found[0] == position else -1)
        return tokens
