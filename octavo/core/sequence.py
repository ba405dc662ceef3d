"""The life of one request inside the engine. Knows no text, no tensors and no memory.

WAITING ──▶ RUNNING ──▶ FINISHED
   ▲           │
   └─ preempted┘
"""

import enum

from octavo.core.request import FinishReason, Request


class SequenceStatus(enum.Enum):
    """Where a sequence stands; only the scheduler moves it."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A request and what has been computed of it. Sole writer: the scheduler.

    The scheduling rule needs two numbers only: `num_tokens` (known ids) and `num_computed_tokens`
    (ids whose KV is in the cache). Every step lets the second catch up with the first; when it has,
    the step's logits yield one more token.
    """

    __slots__ = (
        "block_ids",
        "block_keys",
        "finish_reason",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_named_blocks",
        "num_preemptions",
        "num_prompt_tokens",
        "request",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, request: Request, max_tokens: int):
        self.request = request
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max_tokens
        self.stop_ids = request.stop_ids
        self.num_computed_tokens = 0
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
        """Known token ids: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated token ids."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """What the scheduling rule wants to run."""
        return len(self.token_ids) - self.num_computed_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Take one sampled token; return why the sequence is over, or None."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids and self.num_output_tokens >= self.request.sampling.min_tokens:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None
