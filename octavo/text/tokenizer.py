"""The tokenizer of a checkpoint, on top of the `tokenizers` library.

Owns loading, the bytes behind each token, and who may write control tokens. Chat templates and
GGUF vocabularies have files of their own. Knows no requests and no tensors.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models

from octavo.config import Checkpoint
from octavo.errors import CheckpointError, RequestError, UnsupportedModelError
from octavo.text.chat_template import ChatTemplate
from octavo.text.detokenizer import IncrementalDetokenizer
from octavo.text.gguf_vocabulary import SPACE, tokenizer_from_gguf
from octavo.text.interface import Tokenizer
from octavo.text.pairs import TokenPair
from octavo.text.special_tokens import BREAK, SpecialTokens
from octavo.text.tokenizer_file import read_tokenizer_file

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SAMPLE = "Hello, wörld!\n 12\t你好🙂"  # every sound tokenizer can encode it
# Names under which templates know special tokens, and the GGUF keys of the same.
TEMPLATE_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # sic
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Read the tokenizer of a located checkpoint.

    Raises:
        CheckpointError: its files are missing or damaged.
        UnsupportedModelError: a sound tokenizer of a kind that we do not have.
    """
    if checkpoint.kind == "gguf":
        library = tokenizer_from_gguf(checkpoint)
    else:
        library = read_tokenizer_file(checkpoint.tokenizer_file())
    names = _special_names(checkpoint)
    tokenizer = LibraryTokenizer(
        library,
        source=str(checkpoint.path),
        template=_chat_template(checkpoint, names),
        bos_token_id=_id_of(library, names.get("bos_token")),
        eos_token_ids=_eos_token_ids(checkpoint, library, names),
    )
    try:
        tokenizer.encode(SAMPLE)
    except RequestError as error:
        raise CheckpointError(f"{checkpoint.path}: damaged tokenizer: {error}") from error
    return tokenizer


class LibraryTokenizer:
    """A tokenizer of the library. See `Tokenizer` for what methods do.

    It is BPE (byte-level or SentencePiece-like), Unigram or WordPiece (arXiv 1609.08144, 4.1).
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        source: str,
        template: ChatTemplate | None = None,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        if not isinstance(library.model, models.BPE | models.Unigram | models.WordPiece):
            kind = type(library.model).__name__
            raise UnsupportedModelError(
                f"{source}: {kind} tokenizers are not supported, only BPE, Unigram and WordPiece"
            )
        self._continues = None  # what tokens begin with that go on with a word, of WordPiece
        if isinstance(library.model, models.WordPiece):
            self._continues = library.model.continuing_subword_prefix
        self._library = library
        self._template = template
        self._special = SpecialTokens(library)
        self._is_byte_level, self.strips_leading_space = _decoding(library, source)
        self._bytes: dict[int, bytes] = {}  # of the tokens seen so far
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = library.get_vocab_size()
        self.special_token_ids = self._special.ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._special.encode_plain(text, add_special_tokens=add_special_tokens)

    def encode_pair(self, first: str, second: str) -> TokenPair:
        return self._special.encode_pair(first, second)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        return self._special.encode_rendered(
            self._render(
                messages, add_generation_prompt, template_arguments, continue_final_message
            )
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        rendered = self._render(
            messages, add_generation_prompt, template_arguments, continue_final_message
        )
        return rendered.replace(BREAK, "")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        whole = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return whole.push(token_ids) + whole.flush()

    def token_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._look_up_bytes(token_id)
        return data

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._library.id_to_token(token_id)
        if token is None:  # a row of the embedding that no token uses
            return b""
        if self._is_byte_level:
            try:
                return bytes([BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token, which is written as it is
                return token.encode()
        if self._continues is not None:
            goes_on = token.startswith(self._continues) or token_id in self.special_token_ids
            return (token.removeprefix(self._continues) if goes_on else f" {token}").encode()
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        template_arguments: Mapping[str, Any] | None,
        continue_final_message: bool,
    ) -> str:
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use completions with a plain prompt",
                param="messages",
            )
        shielded = [self._special.shield(message) for message in messages]
        if not shielded or not all(isinstance(message, dict) for message in shielded):
            raise RequestError("messages must be a non-empty list of objects", param="messages")
        arguments = self._special.shield(dict(template_arguments or {}))
        return self._template.render(
            shielded,
            add_generation_prompt=add_generation_prompt,
            template_arguments=arguments,  # type: ignore[arg-type]
            continue_final_message=continue_final_message,
        )


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def _decoding(library: tokenizers.Tokenizer, source: str) -> tuple[bool, bool]:
    """How tokens become text: (byte-level?, is a leading space dropped?).

    Asked by example, since the library's decoders are nested in many ways that mean the same.
    """
    decoder = library.decoder
    if decoder is not None:
        if decoder.decode(["Ġa", "ĠbĊ"]) == " a b\n":
            return True, False
        text = decoder.decode(["▁a", "▁b", "<0xC3>", "<0xA9>"])
        has_no_bytes = isinstance(library.model, models.Unigram) and text == "a b<0xC3><0xA9>"
        if text in ("a bé", " a bé") or has_no_bytes:
            return False, text[0] != " "
        is_word_piece = isinstance(library.model, models.WordPiece)
        if is_word_piece and decoder.decode(["a", "##b", "c"]) == "ab c":
            return False, True
    raise UnsupportedModelError(
        f"{source}: the tokenizer's decoder is not supported; byte-level, SentencePiece's and "
        "WordPiece's are"
    )


def _chat_template(checkpoint: Checkpoint, names: Mapping[str, str]) -> ChatTemplate | None:
    source = checkpoint.chat_template()
    try:
        return None if source is None else ChatTemplate(source, names)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _special_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The special tokens that chat templates know by name, such as {"bos_token": "<s>"}."""
    names: dict[str, str] = {}
    if checkpoint.kind == "gguf":
        metadata = checkpoint.gguf.metadata
        tokens = metadata.get("tokenizer.ggml.tokens")
        for name, key in TEMPLATE_TOKENS.items():
            token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if not isinstance(token_id, int) or not isinstance(tokens, list):
                continue
            if 0 <= token_id < len(tokens):
                names[name] = str(tokens[token_id])
        return names
    config = checkpoint.tokenizer_config()
    for name in TEMPLATE_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            names[name] = content
    return names


def _id_of(library: tokenizers.Tokenizer, name: str | None) -> int | None:
    return None if name is None else library.token_to_id(name)


def _eos_token_ids(
    checkpoint: Checkpoint, library: tokenizers.Tokenizer, names: Mapping[str, str]
) -> tuple[int, ...]:
    """Those of the configs, and the tokenizer's own, which chat models sometimes set alone."""
    ids = dict.fromkeys(checkpoint.eos_token_ids())
    own = _id_of(library, names.get("eos_token"))
    return tuple(ids) if own is None else tuple(ids | {own: None})
