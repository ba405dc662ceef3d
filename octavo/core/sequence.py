"""The life of one request inside the engine. Knows no text, no tensors and no memory.

WAITING ──▶ RUNNING ──▶ FINISHED
   ▲           │
   └─ preempted┘
"""

import enum
import math

from octavo.core.request import FinishReason, Request


class SequenceStatus(enum.Enum):
    """Where a sequence stands; only the scheduler moves it."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A request and what has been computed of it. Sole writer: the scheduler.

    The scheduling rule needs two numbers only: `num_tokens` (known ids) and `num_computed_tokens`
    (ids whose KV is in the cache, or will be after the steps in flight). Every step lets the second
    catch up with the first; when it has, the step's logits yield one more token.
    """

    __slots__ = (
        "arrival_s",
        "block_ids",
        "block_keys",
        "deadline_s",
        "finish_reason",
        "max_num_tokens",
        "num_cached_tokens",
        "num_committed_tokens",
        "num_computed_tokens",
        "num_named_blocks",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "request",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, request: Request, max_tokens: int, *, arrival_s: float):
        deadline_ms = request.options.deadline_ms
        self.request = request
        self.arrival_s = arrival_s
        self.deadline_s = math.inf if deadline_ms is None else arrival_s + deadline_ms / 1e3
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max_tokens
        self.stop_ids = request.stop_ids
        self.num_computed_tokens = 0
        self.num_committed_tokens = 0  # of the computed ones: their step's result was read
        self.num_pending_tokens = 0  # sampled in a step whose result was not read yet
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache at first admission
        # Written by the allocator alone: the block table, the names of its full blocks as far as
        # they were needed, and how many blocks can be found by theirs.
        self.block_ids: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_named_blocks = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def id(self) -> str:
        """The request's id; one sequence a request."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Token ids of prompt and output that the runner knows: ours, and those on their way."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated token ids."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """What the scheduling rule wants to run. The very last token is never computed."""
        num_tokens = min(self.num_tokens, self.max_num_tokens - 1)
        return num_tokens - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens, or after preemption known output tokens, are still to be run."""
        return self.num_uncomputed_tokens > 1 or self.num_computed_tokens < self.num_prompt_tokens

    def commit(self, num_tokens: int) -> int:
        """A step's tokens are now surely in the cache; return how many were of the prompt."""
        prompt_left = max(0, self.num_prompt_tokens - self.num_committed_tokens)
        self.num_committed_tokens += num_tokens
        return min(prompt_left, num_tokens)

    def append(self, token_id: int) -> FinishReason | None:
        """Take one sampled token; return why the sequence is over, or None."""
        self.num_pending_tokens -= 1
        self.token_ids.append(token_id)
        if token_id in self.stop_ids and self.num_output_tokens >= self.request.sampling.min_tokens:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None
