"""How many sequences a KV cache holds, for a mix of lengths.

Owns the meaning of `--lengths` and the arithmetic of blocks over sequences. Knows no bytes and no
models: `MemoryPlan` says how many blocks there are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.core import KVGroups
from octavo.errors import ConfigError

ENTRY = re.compile(r"(\d+)(?:\+(\d+))?:(\d+(?:\.\d+)?)")
EXAMPLE = "512:0.5,2048:0.3,8192:0.2 (tokens:share), or 400+112:0.5,1500+548:0.5 (prompt+output)"


@dataclass(frozen=True, slots=True)
class Pool:
    """The blocks of a KV cache and how sequences get them."""

    num_blocks: int
    block_size: int  # tokens
    allocator: str  # `CacheOptions.kv_allocator`
    longest: int  # tokens of the longest sequence
    groups: KVGroups = KVGroups()

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that a sequence holds when it has so many tokens, and will have no more."""
        if self.allocator == "contiguous":
            num_tokens = self.longest  # everyone gets a run for the longest context
        num_blocks = self.groups.num_blocks_at_rest(num_tokens, self.block_size)
        if self.allocator == "contiguous-buddy":
            return 1 << (num_blocks - 1).bit_length()
        return num_blocks

    def mean_blocks(self, num_tokens: int, num_output_tokens: int) -> float:
        """Blocks of a sequence, averaged over the steps that compute its output tokens."""
        if self.allocator != "paged":
            return self.blocks_of(num_tokens)  # held from the start
        if not self.groups.keep_all:
            lengths = range(num_tokens - num_output_tokens + 1, num_tokens + 1)
            return sum(map(self.blocks_of, lengths)) / num_output_tokens

        def sum_up_to(length: int) -> int:
            """blocks_of(1) + ... + blocks_of(length)"""
            full, rest = divmod(length, self.block_size)
            return self.block_size * full * (full + 1) // 2 + rest * (full + 1)

        grown = sum_up_to(num_tokens) - sum_up_to(num_tokens - num_output_tokens)
        return grown / num_output_tokens

    def num_sequences(self, num_tokens: int) -> int:
        """How many sequences of one length fit."""
        return self.num_blocks // self.blocks_of(num_tokens)


@dataclass(frozen=True, slots=True)
class LengthClass:
    """Requests of one length. `num_output_tokens` is None where only the whole is known."""

    num_tokens: int  # prompt and output together
    num_output_tokens: int | None
    share: float  # of the requests


@dataclass(frozen=True, slots=True)
class MixCapacity:
    """How many sequences of a mix run at once.

    At their ends: all of them hold all their tokens, the worst that can happen; so many never need
    a preemption. On average: what they hold at a random moment under steady load, where a request
    is met in proportion to its number of output tokens (Little's law with equal time a token).
    """

    blocks_at_ends: float  # mean blocks of a sequence that is about to end
    blocks_on_average: float | None  # of a sequence at a random moment
    num_at_ends: int
    num_on_average: int | None


def parse_lengths(text: str) -> tuple[LengthClass, ...]:
    """The classes of "TOKENS:SHARE,..." or "PROMPT+OUTPUT:SHARE,..."; shares become fractions of 1.

    Raises:
        ConfigError: the text has another form, mixes the two, or its shares sum to nothing.
    """
    found = [ENTRY.fullmatch(entry.strip()) for entry in text.split(",")]
    entries = [match.groups() for match in found if match is not None]
    if len(entries) != len(found):
        raise ConfigError(f"--lengths {text!r} cannot be read; write for instance {EXAMPLE}")
    if len({output is None for _, output, _ in entries}) > 1:
        raise ConfigError("--lengths: give prompt+output for every entry or for none")
    classes = [
        LengthClass(
            int(first) + int(output or 0), None if output is None else int(output), float(share)
        )
        for first, output, share in entries
    ]
    total = sum(one.share for one in classes)
    if total <= 0 or any(0 in (one.num_tokens, one.num_output_tokens) for one in classes):
        raise ConfigError("--lengths: tokens must be positive, and shares must not all be 0")
    return tuple(
        LengthClass(one.num_tokens, one.num_output_tokens, one.share / total) for one in classes
    )


def mix_capacity(mix: Sequence[LengthClass], pool: Pool, *, max_num_seqs: int) -> MixCapacity:
    """What a pool holds of a mix, of which `max_num_seqs` run at most."""
    outputs = [one.num_output_tokens for one in mix]
    # Who is met at a random moment: long answers more often than their share of the requests.
    met = [one.share * (output or 1) for one, output in zip(mix, outputs, strict=True)]
    at_ends = _weighted([pool.blocks_of(one.num_tokens) for one in mix], met)
    on_average = None
    if None not in outputs:
        means = [
            pool.mean_blocks(one.num_tokens, output or 1)
            for one, output in zip(mix, outputs, strict=True)
        ]
        on_average = _weighted(means, met)

    def fitting(num_blocks_each: float) -> int:
        return min(int(pool.num_blocks / num_blocks_each), max_num_seqs)

    return MixCapacity(
        blocks_at_ends=at_ends,
        blocks_on_average=on_average,
        num_at_ends=fitting(at_ends),
        num_on_average=None if on_average is None else fitting(on_average),
    )


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
