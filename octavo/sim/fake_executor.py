"""An executor without a model, whose answers give away any mistake of the bookkeeping.

It keeps KV memory, tier by tier, as plain arrays of what was written in each slot. The next token
is a hash of all (position, token) pairs found through the block table, so a wrong block, a stale
slot, a copy not made, a skipped or repeated position changes the text from there on. Where layers
have windows, each group's table is read as far as its window sees, and all of them must agree.
"""

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

from octavo.core import (
    FailureCode,
    NewSequence,
    Reading,
    SampledTokens,
    ScheduledTokens,
    StepPlan,
    StepResult,
    Tier,
    TokenLogprobs,
)
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


def oracle_candidates(
    token_ids: SequenceOf[int], count: int, vocab_size: int
) -> tuple[tuple[int, float], ...]:
    """`count` (token id, logprob) of what may follow, likeliest first: the oracle's, and others."""
    first = oracle_token(token_ids, vocab_size)
    gaps = hashlib.blake2b(array("q", [*token_ids, -1]).tobytes(), digest_size=32).digest()
    found, logprob = [], -0.1
    for index in range(min(count, vocab_size)):
        found.append(((first + index) % vocab_size, logprob))
        logprob -= 0.01 + gaps[index % len(gaps)] / 64
    return tuple(found)


def oracle_score(token_ids: SequenceOf[int], num_top: int, vocab_size: int) -> TokenLogprobs:
    """The score that the last of `token_ids` must have after those before it."""
    top = oracle_candidates(token_ids[:-1], num_top, vocab_size)
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8, person=b"score")
    number = int.from_bytes(digest.digest(), "little")
    return TokenLogprobs(-(number % 1000) / 100, 1 + number % vocab_size, top)


def oracle_vector(token_ids: SequenceOf[int]) -> bytes:
    """The vector that a prompt must have."""
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8, person=b"vector")
    return array("f", digest.digest()).tobytes()


class _Row:
    """What the executor knows of one sequence."""

    __slots__ = (
        "block_ids",
        "new",
        "num_computed_tokens",
        "num_logprobs",
        "num_seen_tokens",
        "token_ids",
    )

    def __init__(self, new: NewSequence):
        self.new = new
        self.num_seen_tokens = 0  # whose hidden states came by: those found in a cache did not
        self.token_ids = list(new.token_ids)
        self.num_computed_tokens = new.num_computed_tokens
        self.block_ids = list(new.block_ids)
        self.num_logprobs = new.num_logprobs


class FakeExecutor:
    """Runs plans on a fake KV memory. Sole writer of its rows and slots.

    windows: of each group of layers; None sees all of a context.
    num_drafts: it guesses so many tokens ahead of each one that it draws; some guesses are wrong.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 16,
        vocab_size: int = 1000,
        num_host_blocks: int = 0,
        num_disk_blocks: int = 0,
        windows: tuple[int | None, ...] = (None,),
        num_drafts: int = 0,
    ):
        self.block_size = block_size
        self._windows = windows
        self.vocab_size = vocab_size
        self._num_drafts = num_drafts
        # One block more than are given out: tables show it where they have none.
        sizes = {Tier.DEVICE: num_blocks + 1}
        sizes |= {Tier.HOST: num_host_blocks, Tier.DISK: num_disk_blocks}
        self._tokens = {tier: [_STALE] * (size * block_size) for tier, size in sizes.items()}
        self._positions = {tier: [-1] * (size * block_size) for tier, size in sizes.items()}
        self._slot_tokens = self._tokens[Tier.DEVICE]
        self._slot_positions = self._positions[Tier.DEVICE]
        self._rows: dict[str, _Row] = {}
        self._failing: set[int] = set()

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
        failed = self._transfer(plan)
        sampled = []
        readings: list[Reading] = []
        for share in plan.scheduled:
            row = self._rows[share.sequence_id]
            row.block_ids[share.num_kept_blocks :] = share.new_block_ids
            self._write(row, share)
            if row.new.num_prompt_logprobs is not None or row.new.pooling is not None:
                readings += self._read_prompt(share, row)
            if share.samples:
                sampled.append(self._sample(share, row))
        return StepResult(plan.step, tuple(sampled), failed, readings=tuple(readings))

    def fail_transfer(self, index: int) -> None:
        """In the next step this copy fails: what is in its target then is garbage."""
        self._failing.add(index)

    def poison(self, sequence_id: str, num_tokens: int) -> None:
        """The KV of the last `num_tokens` computed tokens of a sequence is NaN after all.

        Whoever reads it, through whichever block table, gets logits that are not finite.
        """
        row = self._rows[sequence_id]
        for position in range(row.num_computed_tokens - num_tokens, row.num_computed_tokens):
            for group in range(len(self._windows)):
                self._slot_tokens[self._slot(row, position, group)] = _NOT_FINITE

    def _transfer(self, plan: StepPlan) -> tuple[int, ...]:
        size, (failing, self._failing) = self.block_size, (self._failing, set())
        for index, transfer in enumerate(plan.transfers):
            source = slice(transfer.source * size, (transfer.source + 1) * size)
            target = slice(transfer.target * size, (transfer.target + 1) * size)
            for store in (self._tokens, self._positions):
                content = store[transfer.source_tier][source]
                store[transfer.target_tier][target] = (
                    [_STALE] * size if index in failing else content
                )
        return tuple(sorted(failing))

    def _sample(self, share: ScheduledTokens, row: _Row) -> SampledTokens:
        """Check the drafts and draw a token: those that were right, and what follows them."""
        tokens = self._read(row, share.num_tokens)
        if _NOT_FINITE in tokens:
            code = FailureCode.NUMERICAL_ERROR
            return SampledTokens(
                share.sequence_id, (), error="the logits are not finite", error_code=code
            )
        num_known = len(tokens) - len(share.draft_ids)
        drawn: list[int] = []
        for index in range(len(share.draft_ids) + 1):
            drawn.append(oracle_token(tokens[: num_known + index], self.vocab_size))
            if drawn[-1:] != list(share.draft_ids[index : index + 1]):
                break
        row.token_ids += drawn
        row.num_computed_tokens = len(row.token_ids) - 1
        known = tokens[:num_known] + drawn
        return SampledTokens(
            share.sequence_id, tuple(drawn), self._logprobs(row, known[:-1]), self._guess(known)
        )

    def _read_prompt(self, share: ScheduledTokens, row: _Row) -> list[Reading]:
        """Score the tokens that follow this share's; pool the prompt when all of it is there."""
        new, tokens = row.new, self._read(row, share.num_tokens)
        start, stop = len(tokens) - share.num_tokens, len(tokens)
        row.num_seen_tokens += share.num_tokens
        if _NOT_FINITE in tokens:
            return [Reading(share.sequence_id, error="the hidden states are not finite")]
        if new.pooling is not None:
            if stop < new.num_prompt_tokens:
                return []
            if new.pooling.reads_all_tokens and row.num_seen_tokens != stop:
                raise IntegrityError(
                    f"{share.sequence_id}: hidden states are missing from its mean"
                )
            return [Reading(share.sequence_id, vector=oracle_vector(tokens))]
        first = max(start, new.num_scored_tokens)
        after = [*tokens, *row.token_ids[stop : stop + 1]][: new.num_prompt_tokens]
        scores = tuple(
            oracle_score(after[: position + 2], new.num_prompt_logprobs or 0, self.vocab_size)
            for position in range(first, min(stop, new.num_prompt_tokens - 1))
        )
        return [Reading(share.sequence_id, first + 1, scores)] if scores else []

    def _logprobs(self, row: _Row, tokens: list[int]) -> tuple[TokenLogprobs, ...] | None:
        if row.num_logprobs is None:
            return None
        top = oracle_candidates(tokens, row.num_logprobs, self.vocab_size)
        return (TokenLogprobs(top[0][1], 1, top),)

    def _guess(self, known: list[int]) -> tuple[int, ...]:
        """What may follow: mostly right, so that both outcomes of a check come up."""
        guesses = list(known)
        for _ in range(self._num_drafts):
            token_id = oracle_token(guesses, self.vocab_size)
            guesses.append(token_id if token_id % 4 else (token_id + 1) % self.vocab_size)
        return tuple(guesses[len(known) :])

    def _slot(self, row: _Row, position: int, group: int = 0) -> int:
        index = position // self.block_size
        block_id = row.block_ids[index * len(self._windows) + group]
        return block_id * self.block_size + position % self.block_size

    def _write(self, row: _Row, share: ScheduledTokens) -> None:
        start = row.num_computed_tokens
        token_ids = [*row.token_ids[start:], *share.draft_ids][: share.num_tokens]
        if share.draft_ids and start + share.num_tokens != len(row.token_ids) + len(
            share.draft_ids
        ):
            raise IntegrityError(f"{share.sequence_id} has drafts that do not follow its tokens")
        for position, token_id in enumerate(token_ids, start):
            for group in range(len(self._windows)):
                slot = self._slot(row, position, group)
                self._slot_tokens[slot] = token_id
                self._slot_positions[slot] = position
        if len(token_ids) != share.num_tokens:
            raise IntegrityError(f"{share.sequence_id} has not so many tokens to compute")
        row.num_computed_tokens += share.num_tokens

    def _read(self, row: _Row, num_tokens: int) -> list[int]:
        """Token ids as the last `num_tokens` see them; what differs between groups is garbage.

        What no group sees any more is taken from the row: nothing could have been read wrongly.
        """
        stop = row.num_computed_tokens
        tokens: list[int] | None = None
        for group, window in enumerate(self._windows):
            first = 0 if window is None else max(0, stop - num_tokens - window + 1)
            seen = self._read_group(row, group, first)
            if tokens is None:
                tokens = row.token_ids[:first] + seen
            elif tokens[first:] != seen:
                for position, token in enumerate(seen, first):
                    if token != tokens[position]:
                        is_nan = _NOT_FINITE in (token, tokens[position])
                        tokens[position] = _NOT_FINITE if is_nan else _STALE
        return tokens or []

    def _read_group(self, row: _Row, group: int, first: int) -> list[int]:
        """Token ids from position `first` on; a slot of another position reads as garbage."""
        tokens: list[int] = []
        start, size = first, self.block_size
        while start < row.num_computed_tokens:
            stop = min(start - start % size + size, row.num_computed_tokens)
            slot = self._slot(row, start, group)
            found = self._slot_tokens[slot : slot + stop - start]
            positions = self._slot_positions[slot : slot + stop - start]
            expected = list(range(start, stop))
            if positions != expected:
                pairs = zip(found, positions, expected, strict=True)
                found = [token if at == wanted else _STALE for token, at, wanted in pairs]
            tokens += found
            start = stop
        return tokens
