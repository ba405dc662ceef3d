"""A tokenizer from the metadata of a GGUF file, built of the parts of the `tokenizers` library.

Two kinds: "gpt2", byte-level BPE with a pre-tokenizer that the file names, and "llama",
SentencePiece BPE whose merges follow from the pieces' scores. Knows no chat templates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from octavo.config import Checkpoint, excerpt
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.text.tokenizer_file import is_failure

MAX_PIECE_CHARS = 256  # each is tried at every cut; SentencePiece makes them of 16
SPACE = "▁"  # how SentencePiece writes a space

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# The contractions and classes below are OpenAI's, as Llama 3 and Qwen 2 use them; they differ in
# how many digits make one piece.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Style:
    """How a family of byte-level vocabularies cuts text before merging."""

    cut: str  # "gpt2", "digits" (each by itself, then gpt2), or a regular expression
    normalizes: bool = False  # to NFC
    ignores_merges: bool = False  # a whole piece that is a token is taken as it is
    adds_bos: bool = False  # unless the file says otherwise


_GPT2 = _Style("gpt2")
_DIGITS = _Style("digits")
_LLAMA3 = _Style(SPLIT.replace("DIGITS", r"\p{N}{1,3}"), ignores_merges=True, adds_bos=True)
_QWEN2 = _Style(SPLIT.replace("DIGITS", r"\p{N}"), normalizes=True)
STYLES = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}


def tokenizer_from_gguf(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Build the tokenizer that the GGUF file's metadata describes.

    Raises:
        UnsupportedModelError: a kind of tokenizer or pre-tokenizer that we do not have.
        CheckpointError: a vocabulary that is missing, inconsistent or no vocabulary.
    """
    vocabulary = _Vocabulary(checkpoint.gguf.metadata, checkpoint.path)
    kind = vocabulary.string("tokenizer.ggml.model", "")
    if kind == "gpt2":
        return _byte_level(vocabulary)
    if kind == "llama":
        return _sentencepiece(vocabulary)
    raise UnsupportedModelError(
        f"{checkpoint.path}: the tokenizer model {excerpt(repr(kind), 80)} is not supported; "
        "supported: gpt2, llama"
    )


def _byte_level(vocabulary: "_Vocabulary") -> tokenizers.Tokenizer:
    pre = vocabulary.string("tokenizer.ggml.pre", "default")
    if pre not in STYLES:
        raise UnsupportedModelError(
            f"{vocabulary.source}: the pre-tokenizer {excerpt(repr(pre), 80)} is not supported; "
            f"supported: {', '.join(STYLES)}"
        )
    style = STYLES[pre]
    merges = []
    for merge in vocabulary.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = vocabulary.build(merges, ignore_merges=style.ignores_merges)
    if style.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _cutter(style.cut)
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary.add_ends(tokenizer, default_bos=style.adds_bos)
    return tokenizer


def _cutter(cut: str) -> pre_tokenizers.PreTokenizer:
    if cut == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "digits":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(vocabulary: "_Vocabulary") -> tokenizers.Tokenizer:
    adds_space = vocabulary.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer = vocabulary.build(
        _merges_from_scores(vocabulary),
        unk_token=vocabulary.unknown_token(),
        fuse_unk=True,
        byte_fallback=True,
    )
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if adds_space else replace
    )
    strip = [decoders.Strip(" ", left=1)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    vocabulary.add_ends(tokenizer, default_bos=True)
    return tokenizer


def _merges_from_scores(vocabulary: "_Vocabulary") -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the third's score deciding which goes first."""
    scores = vocabulary.numbers("tokenizer.ggml.scores")
    pieces = {
        token: -score
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
        if kind == NORMAL
    }
    merges = []
    if max(map(len, pieces), default=0) > MAX_PIECE_CHARS:
        raise vocabulary.wrong("tokenizer.ggml.tokens", f"at most {MAX_PIECE_CHARS} long, each")
    for piece in sorted(pieces, key=pieces.__getitem__):
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                merges.append((piece[:cut], piece[cut:]))
    return merges


class _Vocabulary:
    """Typed access to the `tokenizer.ggml` keys, and what both kinds of tokenizer share."""

    def __init__(self, metadata: Mapping[str, object], source: Path):
        self.source = source
        self._metadata = metadata
        self.tokens = self.strings("tokenizer.ggml.tokens")
        self.types = self.numbers("tokenizer.ggml.token_type", NORMAL)
        self._ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            raise self.wrong("tokenizer.ggml.tokens", "free of duplicates")

    def build(
        self,
        merges: list[tuple[str, str]],
        *,
        unk_token: str | None = None,
        fuse_unk: bool = False,
        byte_fallback: bool = False,
        ignore_merges: bool = False,
    ) -> tokenizers.Tokenizer:
        """BPE over the tokens, with control and user-defined ones added whole."""
        try:
            model = models.BPE(
                vocab=self._ids,
                merges=merges,
                unk_token=unk_token,
                fuse_unk=fuse_unk,
                byte_fallback=byte_fallback,
                ignore_merges=ignore_merges,
            )
        except BaseException as error:
            if not is_failure(error):
                raise
            raise CheckpointError(f"{self.source}: damaged vocabulary: {excerpt(error)}") from error
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(self._added(special=True))
        tokenizer.add_tokens(self._added(special=False))
        return tokenizer

    def _added(self, *, special: bool) -> list[AddedToken]:
        kinds = (UNKNOWN, CONTROL) if special else (USER_DEFINED,)
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in kinds
        ]

    def unknown_token(self) -> str | None:
        token_id = self.token_id("tokenizer.ggml.unknown_token_id")
        return None if token_id is None else self.tokens[token_id]

    def add_ends(self, tokenizer: tokenizers.Tokenizer, *, default_bos: bool) -> None:
        """Make `encode` write the begin and end tokens that the file asks for."""
        begin = end = None
        if self.flag("tokenizer.ggml.add_bos_token", default_bos):
            begin = self.token_id("tokenizer.ggml.bos_token_id")
        if self.flag("tokenizer.ggml.add_eos_token", False):
            end = self.token_id("tokenizer.ggml.eos_token_id")
        ids = [token_id for token_id in (begin, end) if token_id is not None]
        names = {token_id: self.tokens[token_id] for token_id in ids}
        if names:
            single = [name for name in (names.get(begin), "$A", names.get(end)) if name]  # type: ignore[arg-type]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[(name, i) for i, name in names.items()]
            )

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.wrong(key, "a list of strings")
        return value

    def numbers(self, key: str, default: float | None = None) -> list[float]:
        """A number for each token."""
        value = self._metadata.get(key)
        if value is None and default is not None:
            return [default] * len(self.tokens)
        is_numbers = isinstance(value, list) and all(type(x) in (int, float) for x in value)
        if not isinstance(value, list) or not is_numbers or len(value) != len(self.tokens):
            raise self.wrong(key, f"a list of {len(self.tokens)} numbers")
        return value

    def string(self, key: str, default: str) -> str:
        value = self._metadata.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def token_id(self, key: str) -> int | None:
        value = self._metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.wrong(key, "a token id")
        return value

    def wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: the metadata {key!r} must be {expected}")
