"""A tokenizer without a file: one token a byte. For tests, simulation and trying the server out."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.text.pairs import TokenPair

BOS = 256
EOS = 257
_SPECIAL = {BOS: b"<|bos|>", EOS: b"<|eos|>"}


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8, then come begin and end of sequence.

    Text that spells a special token stays text: special ids cannot be had through `encode`.
    """

    vocab_size = 258
    bos_token_id: int | None = BOS
    eos_token_ids: tuple[int, ...] = (EOS,)
    special_token_ids = frozenset(_SPECIAL)
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of a text, after a begin-of-sequence."""
        ids = list(text.encode())
        return [BOS, *ids] if add_special_tokens else ids

    def encode_pair(self, first: str, second: str) -> TokenPair:
        """The bytes of both texts, an end-of-sequence behind each; the second has a type of 1."""
        ids = [[*text.encode(), EOS] for text in (first, second)]
        owners = [[*([i] * (len(own) - 1)), None] for i, own in enumerate(ids)]
        types = [[i] * len(own) for i, own in enumerate(ids)]
        return TokenPair(ids[0] + ids[1], types[0] + types[1], owners[0] + owners[1])

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of `apply_chat_template`, after a begin-of-sequence."""
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            template_arguments=template_arguments,
            continue_final_message=continue_final_message,
        )
        return self.encode(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """One line a message, "role: content". The template knows no arguments."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            return text.removesuffix("\n")
        return text + ("assistant: " if add_generation_prompt else "")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids; what is not UTF-8 becomes U+FFFD."""
        kept = (i for i in token_ids if i < BOS or not skip_special_tokens)
        return b"".join(_SPECIAL.get(i) or bytes((i,)) for i in kept).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself; nothing for special tokens."""
        return bytes((token_id,)) if token_id < BOS else b""
