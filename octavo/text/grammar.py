"""Shapes of answers as grammars over a model's tokens, by llguidance.

Owns what each way to describe a shape means, and the bounds of what it may cost: the library counts
its work and gives up beyond a limit, so neither compiling nor a mask can take long. Knows no
requests and no tensors.
"""

import itertools
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import msgspec
from llguidance import (
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    TokenizerWrapper,
    regex_to_lark,
)
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from octavo.core import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.text.interface import Tokenizer

# Units of the library's own work; 50,000 of the lexer's are about a millisecond.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,  # of one or two KB
    max_grammar_size=200_000,
    verbose_errors=False,
)
MAX_NESTING = 200  # of brackets: parsers descend into them
# A small model loves white space, and JSON allows any amount between two words.
JSON_SPACES = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}
NO_JSON_SPACES = {"whitespace_flexible": False}
MAX_KEPT = 64  # compiled grammars that nobody waits for
FORGOTTEN_S = 30.0  # who has not asked for so long does not wait any more
NUM_THREADS = 2
MAX_MESSAGE_CHARS = 300


def check_grammar(params: StructuredOutputsParams) -> None:
    """Refuse a shape that cannot be compiled, or would cost too much.

    Takes milliseconds, up to about a second for the largest; other threads run meanwhile.

    Raises:
        RequestError: it is invalid, contradicts itself, or is beyond the limits.
    """
    _check(params.key)


@lru_cache(maxsize=32)  # as many requests ask for the same
def _check(key: bytes) -> None:
    source = _source_of(msgspec.json.decode(key, type=StructuredOutputsParams), {})
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source, limits=LIMITS)
    if is_error:
        raise _refuse("is invalid", messages[0])
    matcher = LLMatcher(_bytes_tokenizer(), source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        if "NoExtension" in matcher.get_error():
            raise _refuse("is invalid", "no text satisfies it")
        raise _refuse("is too complex", matcher.get_error())


def _refuse(verdict: str, reason: str) -> RequestError:
    code = "grammar_too_complex" if "complex" in verdict else "invalid_grammar"
    reason = " ".join(reason.replace("<non-verbose/>", "").split())[:MAX_MESSAGE_CHARS]
    message = f"the shape of the answer {verdict}: {reason}"
    return RequestError(message, param="structured_outputs", code=code)


def _source_of(params: StructuredOutputsParams, special_ids: Mapping[bytes, int]) -> str:
    """The whole answer in the library's own form: text up to `after`, if any, and the shape.

    special_ids: the control tokens by name, which text never spells.
    """
    source = _source_of_shape(params)
    if params.after is None:
        return source
    is_lark = not source.startswith("{")
    shape = {"lark_grammar": source} if is_lark else json.loads(source)["grammars"][0]
    shape |= {"name": "shape"}
    marker = special_ids.get(params.after.encode())
    if marker is not None:
        before = f"start: TEXT <[{marker}]> SPACES @shape\nTEXT: /(?s:.*)/"
    else:
        end = json.dumps(params.after, ensure_ascii=False)
        before = f"start: text SPACES @shape\ntext[suffix={end}]: /(?s:.*)/"
    before += "\nSPACES: /[ \\n]{0,8}/"
    return json.dumps({"grammars": [{"lark_grammar": before}, shape]})


def _source_of_shape(params: StructuredOutputsParams) -> str:
    for text in (params.regex, params.grammar):
        if text is not None and _nesting(text) > MAX_NESTING:
            raise _refuse("is too complex", f"brackets within {MAX_NESTING} brackets")
    if params.regex is not None:
        # \d and \w are ASCII's, as in JSON schemas: nobody who writes them thinks of Tamil digits.
        pattern = regex_to_lark(params.regex, "dw").replace("\n", r"\n")
        return LLMatcher.grammar_from_lark(f"start: /{pattern}/")
    if params.choice is not None:
        literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {literals}")
    if params.grammar is not None:
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(params.grammar))
        except (GbnfToLarkError, RecursionError) as error:
            raise _refuse("is invalid", str(error)) from None
    schema = {"type": "object"} if params.json_object else params.json
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if _nesting(text) > MAX_NESTING:
        raise _refuse("is too complex", f"brackets within {MAX_NESTING} brackets")
    spaces = NO_JSON_SPACES if params.disable_any_whitespace else JSON_SPACES
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=spaces)  # type: ignore[arg-type]
    except ValueError as error:
        raise _refuse("is invalid", str(error)) from None


def _nesting(text: str) -> int:
    """The most brackets that are open at once; those in strings count, too."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


class _Bytes:
    """A vocabulary of bytes: enough to see whether a grammar compiles."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def _bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=_Bytes.eos_token_id)


class _Vocabulary:
    """A model's vocabulary as the library wants to see it."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int, vocab_size: int):
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        own = [tokenizer.token_bytes(i) for i in range(min(tokenizer.vocab_size, vocab_size))]
        self.tokens = own + [b""] * (vocab_size - len(own))
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        for i in self.special_token_ids:  # without names they would all count as one
            self.tokens[i] = self.tokens[i] or f"<|{i}|>".encode()
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(plain, add_special_tokens=False)


@dataclass(slots=True)
class _Compiled:
    """A grammar, or the promise of one."""

    future: Future[LLMatcher]
    asked_s: float = math.inf
    is_awaited: bool = True  # until the first matcher is made of it


class TokenGrammars:
    """Compiles grammars for one vocabulary, in threads, and keeps the last ones.

    Satisfies `octavo.core.Grammars`; its methods belong to one thread.

    load_tokenizer: called once, in one of the threads, when the first grammar is wanted.
    eos_token_ids: at least one; any of them ends an answer that has its shape.
    vocab_size: ids in a mask; those beyond the tokenizer's never follow.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        *,
        eos_token_ids: Sequence[int],
        vocab_size: int,
    ):
        self._load_tokenizer = load_tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._vocab_size = vocab_size
        self._tokens: LLTokenizer | None = None
        self._special_ids: dict[bytes, int] = {}
        self._lock = threading.Lock()  # of the vocabulary, which the first thread reads
        self._threads = ThreadPoolExecutor(NUM_THREADS, "octavo-grammar")
        self._compiled: OrderedDict[bytes, _Compiled] = OrderedDict()  # last asked for, last

    def is_ready(self, params: StructuredOutputsParams) -> bool:
        """As Grammars."""
        return self._ask_for(params).future.done()

    def matcher(self, params: StructuredOutputsParams) -> "TokenMatcher":
        """As Grammars; waits where it is not ready."""
        compiled = self._ask_for(params)
        compiled.is_awaited = False
        return TokenMatcher(compiled.future.result().deep_copy())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _ask_for(self, params: StructuredOutputsParams) -> "_Compiled":
        key, now_s = params.key, time.monotonic()
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = _Compiled(self._threads.submit(self._compile, params))
            self._compiled[key] = compiled
            self._forget(now_s)
        compiled.asked_s = now_s
        self._compiled.move_to_end(key)
        return compiled

    def _forget(self, now_s: float) -> None:
        """Keep the last ones, and those that somebody waits for, lest they be made for ever."""
        for key in list(itertools.islice(self._compiled, max(0, len(self._compiled) - MAX_KEPT))):
            compiled = self._compiled[key]
            if not compiled.is_awaited or compiled.asked_s < now_s - FORGOTTEN_S:
                del self._compiled[key]

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        with self._lock:
            if self._tokens is None:
                tokenizer = self._load_tokenizer()
                ids = tokenizer.special_token_ids
                self._special_ids = {tokenizer.token_bytes(i): i for i in ids}
                vocabulary = _Vocabulary(
                    tokenizer,
                    eos_token_id=self._eos_token_ids[0],
                    vocab_size=self._vocab_size,
                )
                self._tokens = LLTokenizer(
                    TokenizerWrapper(vocabulary), eos_token=self._eos_token_ids
                )
        source = _source_of(params, self._special_ids)
        return LLMatcher(self._tokens, source, log_level=0, limits=LIMITS)


class TokenMatcher:
    """As `octavo.core.Matcher`."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    @property
    def error(self) -> str:
        """As Matcher."""
        if not self._matcher.is_error():
            return ""
        return "the answer cannot go on within its shape, or it takes too much work to see how"

    def accept(self, token_ids: Sequence[int]) -> None:
        """As Matcher."""
        self._matcher.consume_tokens(list(token_ids))

    def write_mask(self, address: int, num_bytes: int) -> None:
        """As Matcher."""
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)

    def copy(self) -> "TokenMatcher":
        """As Matcher."""
        return TokenMatcher(self._matcher.deep_copy())
