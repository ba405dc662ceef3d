"""The life of one request inside the engine. Knows no text, no tensors and no memory.

WAITING ──▶ RUNNING ──▶ FINISHED
   ▲           │
   └─ preempted┘
"""

import enum
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from octavo.core.plan import ScheduledTokens, TokenLogprobs
from octavo.core.request import FinishReason, Request
from octavo.errors import IntegrityError


class SequenceStatus(enum.Enum):
    """Where a sequence stands; only the scheduler moves it."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


# To read a member off its Enum takes 0.1 µs before Python 3.12, which counts where all pass.
WAITING, RUNNING, FINISHED = SequenceStatus


class Fork(NamedTuple):
    """A sequence that begins with the same tokens as another one, and may share its blocks."""

    parent: "Sequence"
    num_tokens: int  # that both begin with


@dataclass(frozen=True, slots=True)
class Swapped:
    """A preempted sequence's KV, kept in blocks of the host tier. Owned by the allocator."""

    host_block_ids: list[int]
    num_tokens: int


class Sequence:
    """A request and what has been computed of it. Sole writer: the scheduler.

    The scheduling rule needs two numbers only: `num_tokens` (known ids, and drafts) and
    `num_computed_tokens` (ids whose KV is in the cache, or will be after the steps in flight).
    Every step lets the second catch up with the first; when it has, the step's logits yield one
    more token, and one for each draft that was right.
    """

    __slots__ = (
        "arrival",
        "arrival_s",
        "awaits_result",
        "block_ids",
        "block_keys",
        "deadline_s",
        "draws",
        "draft_ids",
        "finish_reason",
        "first_scheduled_s",
        "fork",
        "id",
        "images",
        "is_beam",
        "is_known",
        "max_num_computed_tokens",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_committed_tokens",
        "num_computed_tokens",
        "num_logprobs",
        "num_named_blocks",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "pictures",
        "request",
        "scores",
        "shares_blocks",
        "status",
        "stop_ids",
        "swapped",
        "token_ids",
        "valid_from_step",
        "vector",
        "waits_for_results",
    )

    def __init__(self, request: Request, max_tokens: int, *, arrival_s: float, arrival: int = 0):
        deadline_ms = request.options.deadline_ms
        self.request = request
        self.id = request.request_id  # one sequence a request
        self.arrival = arrival  # a number that grows from one to the next
        self.arrival_s = arrival_s
        self.first_scheduled_s = math.inf  # when a step was first planned with it
        self.deadline_s = math.inf if deadline_ms is None else arrival_s + deadline_ms / 1e3
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        seen = request.images.salted(request.options.cache_salt)
        self.images = seen.places
        self.pictures = {picture.key: picture for picture in seen.pictures}
        self.max_num_tokens = self.num_prompt_tokens + max_tokens
        self.draws = max_tokens > 0
        # The last token that is drawn is never computed.
        self.max_num_computed_tokens = self.max_num_tokens - self.draws
        self.min_num_tokens = self.num_prompt_tokens + request.sampling.min_tokens
        self.stop_ids = request.stop_ids
        self.num_logprobs = request.sampling.logprobs
        self.num_prompt_logprobs = request.sampling.prompt_logprobs
        self.scores: list[TokenLogprobs] = []  # of the prompt's tokens after the first
        self.vector = b""  # the pooled prompt, as soon as it is computed
        self.fork: Fork | None = None
        self.is_beam = request.sampling.use_beam_search
        # What follows a result is decided with it, even where there were no drafts.
        self.waits_for_results = self.is_beam or not self.draws
        self.draft_ids: SequenceOf[int] = ()  # guesses of what follows `token_ids`
        self.num_computed_tokens = 0
        self.num_committed_tokens = 0  # of the computed ones: their step's result was read
        self.num_pending_tokens = 0  # sampled in a step whose result was not read yet
        self.awaits_result = False  # what follows is not known before that result is read
        self.valid_from_step = 0  # tokens of earlier steps came of lost memory
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache at first admission
        self.is_known = False  # the runner has it as it is here
        # Written by the allocator alone: the block table, whether another sequence may hold its
        # last block, the names of its full blocks as far as they were needed, how many blocks can
        # be found by theirs, and what lies in host memory.
        self.block_ids: list[int] = []
        self.shares_blocks = False
        self.block_keys: list[bytes] = []
        self.num_named_blocks = 0
        self.swapped: Swapped | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Token ids that the runner knows, ours and those on their way to us, and drafts."""
        return len(self.token_ids) + self.num_pending_tokens + len(self.draft_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated token ids."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """What the scheduling rule wants to run."""
        if self.awaits_result:
            return 0
        num_tokens = len(self.token_ids) + self.num_pending_tokens + len(self.draft_ids)
        limit = self.max_num_computed_tokens
        return (num_tokens if num_tokens < limit else limit) - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens, or after preemption known output tokens, are still to be run."""
        num_uncomputed = self.num_uncomputed_tokens - len(self.draft_ids)
        return num_uncomputed > 1 or self.num_computed_tokens < self.num_prompt_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """Leading tokens whose KV may come from a cache: nobody needs their hidden states any more.

        At least the last token is computed, for its logits are needed.
        """
        pooling = self.request.pooling
        if pooling is not None and pooling.reads_all_tokens:
            return 0
        if self.awaits_scores:
            return len(self.scores)
        return len(self.token_ids) - 1

    @property
    def awaits_scores(self) -> bool:
        """Whether prompt tokens are still to be scored."""
        return (
            self.num_prompt_logprobs is not None and len(self.scores) < self.num_prompt_tokens - 1
        )

    @property
    def is_over_without_draws(self) -> bool:
        """Whether the prompt is computed, and that is all that was asked for."""
        return not self.draws and self.num_committed_tokens == self.num_prompt_tokens

    @property
    def end_without_draws(self) -> FinishReason:
        """Why it is over then: the vector is there, or the limit of no tokens is reached."""
        return FinishReason.LENGTH if self.request.pooling is None else FinishReason.STOP

    @property
    def goes_first(self) -> bool:
        """Whether it goes before those who never ran: pushed out, or forked from one that ran."""
        return self.num_preemptions > 0 or self.fork is not None

    def run(self, num_tokens: int) -> bool:
        """A step computes so many more tokens; return whether it yields a new one.

        Drafts that the step leaves out are given up: the next result brings better ones.
        """
        self.num_computed_tokens += num_tokens
        num_drafts = self.num_computed_tokens - len(self.token_ids) - self.num_pending_tokens
        self.draft_ids = self.draft_ids[: max(0, num_drafts)]
        if num_drafts < 0:
            return False
        if self.draft_ids or self.waits_for_results:
            self.awaits_result = True
            return self.draws
        self.num_pending_tokens += 1
        return True

    def guess(self, draft_ids: SequenceOf[int]) -> None:
        """Take guesses of what follows, as far as they could ever be computed.

        They come too late where a step is in flight that was planned without them.
        """
        if not self.num_pending_tokens and self.num_computed_tokens:
            self.draft_ids = draft_ids[: self.max_num_computed_tokens - len(self.token_ids)]

    def lose_memory(self) -> None:
        """No KV is left: everything is computed again when there is room."""
        self.num_computed_tokens = self.num_committed_tokens = 0
        self.draft_ids = ()
        self.is_known = False
        if not self.draws:
            self.awaits_result = (
                False  # what a step in flight finds of an earlier life ends nothing
            )

    def commit(self, share: ScheduledTokens) -> int:
        """A step's tokens are now surely in the cache; return how many were of the prompt."""
        prompt_left = self.num_prompt_tokens - self.num_committed_tokens
        num_sure = share.num_tokens - len(share.draft_ids)
        self.num_committed_tokens += num_sure
        return min(prompt_left, num_sure) if prompt_left > 0 else 0

    def take_scores(self, start: int, scores: SequenceOf[TokenLogprobs]) -> None:
        """Take those of prompt tokens from index `start` on; what is known already is not new."""
        num_known = len(self.scores) + 1 - start
        if num_known < 0:
            raise IntegrityError(f"{self.id}: prompt tokens before {start} were not scored")
        self.scores += scores[num_known:]

    def extend(self, token_ids: SequenceOf[int], num_drafts: int) -> FinishReason | None:
        """Take the tokens of a step that checked so many drafts; return why it is over, or None.

        Tokens after the end are dropped. Of what was computed for drafts, only those that were
        right stay.
        """
        if not num_drafts:
            self.num_pending_tokens -= 1
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if reason := self._why_over():
                return reason
        if num_drafts:
            self.draft_ids = ()
            self.awaits_result = False
            if self.num_computed_tokens:  # it may have been pushed out in the meantime
                self.num_computed_tokens = self.num_committed_tokens = len(self.token_ids) - 1
        return None

    def _why_over(self) -> FinishReason | None:
        num_tokens = len(self.token_ids)
        if num_tokens >= self.min_num_tokens and self.token_ids[-1] in self.stop_ids:
            return FinishReason.STOP
        if num_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None
