"""What the rest of Octavo needs of a tokenizer. Fakes in tests satisfy it in a few lines."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from octavo.text.pairs import TokenPair


class Tokenizer(Protocol):
    """Text to token ids and back, for one model. Safe to use from several threads.

    Text is text: a prompt or a message that spells a special token ("<|im_end|>") is encoded as
    the characters that it has. Only the chat template itself writes control tokens.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids that stand for text; the model's embedding may have more rows."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens, which `skip_special_tokens` leaves out of a text."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether a text's first token carries a space that is not part of the text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the model's begin (and end) tokens where it wants them."""
        ...

    def encode_pair(self, first: str, second: str) -> TokenPair:
        """The ids of two texts as one prompt, with what the model wants around and between them.

        Raises:
            RequestError: the tokenizer fails on a text.
        """
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation, as the model's chat template writes it.

        continue_final_message: nothing follows the last message's text, so that it can be gone on
            with; there can be no generation prompt then.

        Raises:
            RequestError: the model has no chat template, or it cannot write these messages.
        """
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The text that `encode_chat` encodes, for people to look at."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids; what is not UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character.

        Those of a control token spell its name; an id without a token has none.
        """
        ...
