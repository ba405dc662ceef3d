"""Token ids to vectors where a token also has a type: which of a pair's texts it belongs to."""

import torch
from torch import Tensor, nn

from octavo.config import ModelConfig
from octavo.layers.build import Build
from octavo.layers.slot import Slot


class TypedTokens:
    """The sum of a token's vector and its type's (arXiv 1810.04805, section 3, figure 2).

    Token `id` of type `t` comes as `id + t * vocab_size`: so types go with the ids, and nobody
    between the tokenizer and this table need know of them.
    """

    def __init__(self, config: ModelConfig, build: Build):
        self._vocab_size = config.vocab_size
        self._tokens, self._types = (
            torch.empty((num_rows, config.hidden_size), dtype=build.dtype, device=build.device)
            for num_rows in (config.vocab_size, config.num_token_types)
        )

    def slots(self, tokens_name: str, types_name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        tables = {tokens_name: self._tokens, types_name: self._types}
        return {f"{n}.weight": Slot(tuple(t.shape), t.copy_) for n, t in tables.items()}

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T], types included -> [T, hidden_size]."""
        x = nn.functional.embedding(token_ids % self._vocab_size, self._tokens)
        types = token_ids.div(self._vocab_size, rounding_mode="floor")
        return x.add_(nn.functional.embedding(types, self._types))
