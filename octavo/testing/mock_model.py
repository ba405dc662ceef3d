"""A model without weights whose logits prove that the runner's tensors are right."""

import torch
from torch import Tensor

from octavo.config import AttentionConfig
from octavo.layers import Attention, Build, Slot, StepContext
from octavo.models import Model


def mock_next_token(token_ids: list[int], vocab_size: int) -> int:
    """The token that `MockModel` puts first after `token_ids`."""
    return sum((position + 1) * token for position, token in enumerate(token_ids)) % vocab_size


class MockModel(Model):
    """Writes each token id to the KV cache and answers from what the block table leads to.

    The likeliest next token is `mock_next_token` of everything that the cache holds for the
    sequence, so a wrong slot, position or block table changes it.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self._vocab_size = vocab_size
        # Declares one layer with one head of one value, which is all that is kept of a token.
        shape = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2, scale=1.0, rope=None)
        self.attention = Attention(shape, 0, Build("cpu", torch.float32))

    def slots(self) -> dict[str, Slot]:
        return {}

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> [S, 1]: for each wanted token, what must follow it."""
        keys = context.kv_caches[0][0, :, 0, :, 0]  # [num_blocks, block_size]
        block_size = keys.shape[1]
        weighted = (context.positions + 1) * token_ids
        keys[context.slots // block_size, context.slots % block_size] = weighted.float()
        batch, answers = context.attention, torch.zeros(len(token_ids), 1)
        for b, context_len in enumerate(batch.context_lens.tolist()):
            first, last = batch.query_starts[b : b + 2].tolist()
            history = keys[batch.block_tables[b].long()].flatten()[:context_len]
            sums = history.double().cumsum(0)[context_len - (last - first) :]
            answers[first:last, 0] = (sums % self._vocab_size).float()
        [wanted] = context.wanted_of(answers)
        return wanted

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), self._vocab_size).float()
