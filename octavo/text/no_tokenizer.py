"""The tokenizer of an engine that was told to load none: ids go in, ids come out, text is empty.

It stands where a tokenizer would, so that nobody has to ask for None: whoever needs text to become
ids, or a text that is more than empty, gets an error that says which option left it out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from octavo.errors import RequestError
from octavo.text.pairs import TokenPair


class NoTokenizer:
    """See `Tokenizer` for what the methods would do."""

    vocab_size = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        _refuse("a prompt must be given as token ids", "prompt")

    def encode_pair(self, first: str, second: str) -> TokenPair:
        _refuse("a pair of texts must be texts that can be encoded", "prompt")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        _refuse("use completions with a prompt of token ids", "messages")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        _refuse("no chat template was loaded", "messages")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        _refuse("token ids cannot be read as text", None)

    def token_bytes(self, token_id: int) -> bytes:
        return b""


def _refuse(consequence: str, param: str | None) -> NoReturn:
    raise RequestError(f"there is no tokenizer (skip_tokenizer_init): {consequence}", param=param)
