"""What passes between scheduler and runner: an immutable plan down, an immutable result up.

The plan is a difference. A sequence that the runner does not know comes whole; one that it knows
comes as "run this many more tokens, with these new blocks". Sampled ids need not travel back down:
the runner appends them to its own copy when it samples them.
"""

import msgspec

from octavo.core.sampling import SamplingParams


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


class ScheduledTokens(msgspec.Struct, frozen=True):
    """This step's share of one sequence."""

    sequence_id: str
    num_tokens: int
    new_block_ids: tuple[int, ...]  # appended to the block table before the step; empty when new
    samples: bool  # the last of these tokens yields logits to draw from


class StepPlan(msgspec.Struct, frozen=True):
    """One step of the engine, in full."""

    step: int
    new: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledTokens, ...]
    dropped: tuple[str, ...]  # finished, aborted or preempted since the last plan: forget them

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


class SampledToken(msgspec.Struct, frozen=True):
    """What one sequence got from a step: a token, or the reason why it cannot go on."""

    sequence_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None  # set: this sequence failed (NaN logits, say); others are unaffected


class StepResult(msgspec.Struct, frozen=True):
    """The runner's answer to a plan: one entry for each scheduled sequence with `samples`."""

    step: int
    sampled: tuple[SampledToken, ...]
