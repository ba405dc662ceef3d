"""Token ids to vectors and vectors to logits, with one matrix or two."""

from typing import Any

import torch
from torch import Tensor, nn

from octavo.kernels import Choice
from octavo.layers.build import Build, Layer
from octavo.layers.slot import Slot


class Vocabulary(Layer):
    """The embedding and the output head. Tied, both read one copy of one matrix."""

    def __init__(self, vocab_size: int, hidden_size: int, build: Build, *, tied: bool):
        super().__init__()
        self._shape = (vocab_size, hidden_size)
        self.head = build.weight(vocab_size, hidden_size)
        self.embedding = (
            None if tied else torch.empty(self._shape, dtype=build.dtype, device=build.device)
        )

    def slots(self, embedding_name: str, head_name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors; a tied model has no head of its own."""
        all_rows = slice(0, self._shape[0])
        load_head = Slot(self._shape, lambda tensor: self.head.place(all_rows, tensor))
        if self.embedding is None:
            return {f"{embedding_name}.weight": load_head}
        return {
            f"{embedding_name}.weight": Slot(self._shape, self.embedding.copy_),
            f"{head_name}.weight": load_head,
        }

    def finish(self) -> tuple[Choice[Any], ...]:
        return (self.head.finish(),)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, hidden_size]."""
        if self.embedding is None:
            return self.head.gather_rows(token_ids)
        return nn.functional.embedding(token_ids, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> [S, vocab_size], in the weights' dtype."""
        return self.head.apply(hidden, None)
