"""A tokenizer without a file: one token a byte. For tests, simulation and trying the server out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BOS = 256
EOS = 257
_SPECIAL = {BOS: "<|bos|>", EOS: "<|eos|>"}


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8, then come begin and end of sequence.

    Text that spells a special token stays text: special ids cannot be had through `encode`.
    """

    vocab_size = 258
    eos_token_ids: tuple[int, ...] = (EOS,)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of a text, after a begin-of-sequence."""
        ids = list(text.encode())
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of bytes; broken UTF-8 becomes replacement characters."""
        parts: list[bytes] = []
        for token_id in ids:
            if token_id < BOS:
                parts.append(bytes((token_id,)))
            elif not skip_special_tokens:
                parts.append(_SPECIAL[token_id].encode())
        return b"".join(parts).decode(errors="replace")

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """One line a message, "role: content"."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))
