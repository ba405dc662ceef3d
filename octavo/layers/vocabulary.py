"""Token ids to vectors and vectors to logits, with one matrix or two."""

from typing import Any

import torch
from torch import Tensor, nn

from octavo.config import ModelConfig
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


class ScaledVocabulary(Vocabulary):
    """With embeddings that are multiplied by a constant, and logits that may be softcapped.

    Both round where transformers' Gemma does: the constant to the dtype of the weights, and the
    logits after each of division, tanh and product.
    """

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(
            config.vocab_size, config.hidden_size, build, tied=config.tie_word_embeddings
        )
        self._scale = torch.tensor(config.embedding_scale, dtype=build.dtype).item()
        self._softcap = config.final_logit_softcap

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, hidden_size]."""
        return super().embed(token_ids) * self._scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> [S, vocab_size], in the weights' dtype."""
        logits = super().logits(hidden)
        if self._softcap is None:
            return logits
        return logits.div_(self._softcap).tanh_().mul_(self._softcap)


def create_vocabulary(config: ModelConfig, build: Build) -> Vocabulary:
    """The vocabulary that a model's config asks for."""
    if config.embedding_scale != 1.0 or config.final_logit_softcap is not None:
        return ScaledVocabulary(config, build)
    return Vocabulary(config.vocab_size, config.hidden_size, build, tied=config.tie_word_embeddings)
