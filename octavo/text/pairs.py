"""Two texts as one prompt, for models that read a query and a document together.

Owns how a pair is cut where it is too long. Knows no models: what stands around and between the
texts is the tokenizer's.
"""

from collections.abc import Sequence
from typing import NamedTuple


class TokenPair(NamedTuple):
    """A pair's ids, all three of one length."""

    token_ids: Sequence[int]
    type_ids: Sequence[int]  # the model's types of tokens: 0 or 1, or 0 everywhere
    owners: Sequence[int | None]  # 0 or 1, the text that it stands for; None: put there around it

    def with_types(self, vocab_size: int, num_types: int) -> list[int]:
        """The ids as a model with types takes them: see `octavo.layers.TypedTokens`."""
        most = num_types - 1
        typed = zip(self.token_ids, self.type_ids, strict=True)
        return [token_id + min(kind, most) * vocab_size for token_id, kind in typed]

    def cut_to(self, limit: int) -> "TokenPair":
        """At most `limit` tokens: the ends of the longer text go, then those of both.

        As tokenizers do it under the name "longest first". What stands around the texts stays.
        """
        excess = len(self.token_ids) - limit
        if excess <= 0:
            return self
        lengths = [sum(owner == text for owner in self.owners) for text in (0, 1)]
        room = max(0, sum(lengths) - excess)
        shorter = int(lengths[1] < lengths[0])
        keep = [0, 0]
        keep[shorter] = min(lengths[shorter], room // 2)
        keep[1 - shorter] = room - keep[shorter]
        kept = []
        for index, owner in enumerate(self.owners):
            if owner is None or keep[owner] > 0:
                kept.append(index)
            if owner is not None:
                keep[owner] -= 1
        return TokenPair(
            [self.token_ids[i] for i in kept],
            [self.type_ids[i] for i in kept],
            [self.owners[i] for i in kept],
        )
