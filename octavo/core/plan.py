"""What passes between scheduler and runner: an immutable plan down, an immutable result up.

The plan is a difference. A sequence that the runner does not know comes whole; one that it knows
comes as "run this many more tokens, with these new blocks". Sampled ids need not travel back down:
the runner appends them to its own copy when it samples them.
"""

import enum

import msgspec

from octavo.core.failure import FailureCode
from octavo.core.images import ImageInput, Picture
from octavo.core.pooling import PoolingParams
from octavo.core.sampling import SamplingParams


class Tier(enum.IntEnum):
    """Where a KV block's content lies; each tier numbers its blocks from 0."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Transfer(msgspec.Struct, frozen=True):
    """The content of one KV block is copied to another, in all layers."""

    source_tier: Tier
    source: int
    target_tier: Tier
    target: int
    key: bytes = b""  # the content's name, which a disk keeps beside it


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that the runner meets for the first time, or again after preemption."""

    sequence_id: str
    token_ids: tuple[int, ...]  # prompt, and output so far after preemption
    num_prompt_tokens: int
    num_computed_tokens: int  # > 0 where a cached prefix already holds KV
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    stop_ids: frozenset[int]  # masked until `sampling.min_tokens` are out
    num_logprobs: int | None = None  # report the likeliest tokens, so many of them
    banned: tuple[tuple[int, ...], ...] = ()  # sequences that must not be completed
    # What else than draws is made of the prompt's hidden states:
    num_prompt_logprobs: int | None = None  # score its tokens; report the likeliest, so many
    num_scored_tokens: int = 0  # those that were scored before preemption: not again
    pooling: PoolingParams | None = None
    images: tuple[ImageInput, ...] = ()
    adapter: str | None = None  # the digest of the one that its tokens go through


class ScheduledTokens(msgspec.Struct, frozen=True):
    """This step's share of one sequence.

    The last of its tokens may be drafts: guesses of what comes next, to be checked in this step.
    Before the step the block table becomes its first `num_kept_blocks` entries and `new_block_ids`;
    for a new sequence, whose table came whole, both are empty.
    """

    sequence_id: str
    num_tokens: int  # drafts included
    num_kept_blocks: int
    new_block_ids: tuple[int, ...]
    samples: bool  # the last of these tokens, and each before a draft, yields logits to draw from
    draft_ids: tuple[int, ...] = ()


class StepPlan(msgspec.Struct, frozen=True):
    """One step of the engine, in full."""

    step: int
    new: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledTokens, ...]
    dropped: tuple[str, ...]  # finished, aborted or preempted since the last plan: forget them
    transfers: tuple[Transfer, ...] = ()  # to be done in this order, before any token is computed
    forgotten_images: tuple[str, ...] = ()  # contents whose rows are to be dropped, known or not
    pictures: tuple[Picture, ...] = ()  # to be encoded and kept, before any token is computed

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model in this step."""
        return sum(share.num_tokens for share in self.scheduled)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, of the distribution before temperature.

    `top` lists (token id, logprob), likeliest first.
    """

    logprob: float
    rank: int  # 1 where the drawn token was the likeliest
    top: tuple[tuple[int, float], ...]


class SampledTokens(msgspec.Struct, frozen=True):
    """What one sequence got from a step: tokens, or the reason why it cannot go on.

    Without drafts there is one token. With drafts there are as many as were guessed right, and one
    more: each is what would have been drawn at its place had there been no drafts.
    """

    sequence_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each of `token_ids` when asked for
    draft_ids: tuple[int, ...] = ()  # guesses of what follows, for a later step to check
    error: str | None = None  # set: this sequence failed (NaN logits, say); others are unaffected
    error_code: FailureCode = FailureCode.GENERATION_FAILED


class Reading(msgspec.Struct, frozen=True):
    """What a step made of a prompt's hidden states besides draws."""

    sequence_id: str
    start: int = 1  # index in the prompt of the first token that is scored
    scores: tuple[TokenLogprobs, ...] = ()  # of this token and those after it
    vector: bytes = b""  # the pooled prompt, float32; with the step of the last prompt token
    error: str | None = None  # set: the hidden states are not finite; others are unaffected


class StepResult(msgspec.Struct, frozen=True):
    """The runner's answer to a plan: one entry for each scheduled sequence with `samples`."""

    step: int
    sampled: tuple[SampledTokens, ...]
    failed_transfers: tuple[int, ...] = ()  # indices into the plan's: these contents are lost
    transfer_s: float = 0.0  # seconds of those between device and host
    readings: tuple[Reading, ...] = ()  # of those that asked for more than draws
