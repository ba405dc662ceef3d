"""Log-probabilities in the two shapes that OpenAI gives them. Knows no streams and no requests."""

from collections.abc import Sequence
from typing import Any

from octavo.core import TokenLogprobs
from octavo.text import Tokenizer

_FLOOR = -9999.0  # OpenAI's: minus infinity is no JSON


class LogprobShaper:
    """Renders tokens of one model. Token texts are remembered; there are only so many."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def completion(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], *, offset: int
    ) -> dict[str, Any]:
        """Four parallel lists; `offset` is where, in the answer's text, the first token begins.

        A token without log-probabilities, the first one of a prompt, has null in two of them.
        """
        tokens = [self.text_of(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry and max(entry.logprob, _FLOOR) for entry in logprobs],
            "top_logprobs": [
                entry
                and {self.text_of(i): max(logprob, _FLOOR) for i, logprob in entry.top}
                | {token: max(entry.logprob, _FLOOR)}
                for token, entry in zip(tokens, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
    ) -> list[dict[str, Any] | None]:
        """vLLM's list: null for the first token, then objects by token id, in decimal digits.

        Each holds the prompt's token and the `num_top` likeliest ones in its place.
        """
        entries: list[dict[str, Any] | None] = [None]
        for token_id, entry in zip(token_ids[1:], logprobs, strict=True):
            ranked = {token_id: (entry.logprob, entry.rank)}
            for rank, (other, logprob) in enumerate(entry.top[:num_top], start=1):
                ranked.setdefault(other, (logprob, rank))
            entries.append(
                {
                    str(i): {
                        "logprob": max(logprob, _FLOOR),
                        "rank": rank,
                        "decoded_token": self.text_of(i),
                    }
                    for i, (logprob, rank) in ranked.items()
                }
            )
        return entries

    def num_chars(self, token_ids: Sequence[int]) -> int:
        """Characters that `completion` counts for these tokens."""
        return sum(len(self.text_of(token_id)) for token_id in token_ids)

    def chat(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> list[dict[str, Any]]:
        """One object a token, each with its alternatives."""
        return [
            self._entry(token_id, entry.logprob)
            | {"top_logprobs": [self._entry(i, logprob) for i, logprob in entry.top]}
            for token_id, entry in zip(token_ids, logprobs, strict=True)
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """`bytes` is null for control tokens, which stand for none."""
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": self.text_of(token_id),
            "logprob": max(logprob, _FLOOR),
            "bytes": list(data) or None,
        }

    def text_of(self, token_id: int) -> str:
        """A token on its own, as clients see it."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._read(token_id)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text."""
        return not self._tokenizer.token_bytes(token_id)

    def _read(self, token_id: int) -> str:
        """A part of a character is spelt out, as OpenAI does, so that two of them differ."""
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
