"""What the runner keeps of each sequence between steps. Sole writer: the model runner."""

import copy
from collections.abc import Sequence

from octavo.core import NewSequence


class Row:
    """One sequence: its ids, its place in the KV cache, its sampling options."""

    __slots__ = (
        "block_ids",
        "min_num_tokens",
        "num_computed_tokens",
        "num_logprobs",
        "num_prompt_tokens",
        "sampling",
        "seed",
        "sequence_id",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, new: NewSequence):
        self.sequence_id = new.sequence_id
        self.token_ids = list(new.token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.num_computed_tokens = new.num_computed_tokens
        self.block_ids = list(new.block_ids)
        self.sampling = new.sampling
        self.seed = new.seed
        self.stop_ids = new.stop_ids
        self.num_logprobs = new.num_logprobs
        self.min_num_tokens = new.num_prompt_tokens + new.sampling.min_tokens

    def with_tokens(self, token_ids: Sequence[int]) -> "Row":
        """The same sequence as if these were its next tokens."""
        row = copy.copy(self)
        row.token_ids = [*self.token_ids, *token_ids]
        return row
