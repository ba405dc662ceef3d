"""What shape an answer must have, and what the runner needs of whoever knows grammars."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from octavo.errors import RequestError

MAX_GRAMMAR_CHARS = 2**18
MAX_CHOICES = 10_000
KINDS = ("json", "regex", "choice", "grammar", "json_object")


MAX_AFTER_CHARS = 100


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The shape of an answer: exactly one of the first five. Names as in vLLM, but for `after`.

    json: a JSON schema, as a mapping or as text; the answer is a JSON document that satisfies it.
    regex: the whole answer matches it (Rust's syntax, no look-around).
    choice: the answer is one of these strings.
    grammar: a context-free grammar, in Lark's form or in llama.cpp's GBNF.
    json_object: the answer is any JSON object.
    disable_any_whitespace: JSON without a space or a new line.
    after: anything may come before this text, and only what comes behind it has the shape. So a
        model may think first: "</think>".
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    after: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = f"got {' and '.join(given)}" if given else "got none"
            rule = f"structured_outputs must have exactly one of {', '.join(KINDS)}"
            raise _refuse(f"{rule}: {found}")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise _refuse(f"structured_outputs.{name} must be a string")
        if not isinstance(self.json, (str, dict, type(None))):
            raise _refuse("structured_outputs.json must be a JSON schema: an object, or its text")
        choices = () if self.choice is None else self.choice
        if isinstance(choices, str) or not all(isinstance(text, str) and text for text in choices):
            raise _refuse("structured_outputs.choice must be a list of strings, none of them empty")
        if self.choice is not None and not 0 < len(choices) <= MAX_CHOICES:
            raise _refuse(f"structured_outputs.choice must have 1 to {MAX_CHOICES} strings")
        after = self.after
        if after is not None and not (isinstance(after, str) and 0 < len(after) <= MAX_AFTER_CHARS):
            raise _refuse(f"structured_outputs.after must have 1 to {MAX_AFTER_CHARS} characters")
        if len(self.key) > MAX_GRAMMAR_CHARS:
            raise _refuse(f"structured_outputs must have at most {MAX_GRAMMAR_CHARS} bytes as JSON")

    @property
    def key(self) -> bytes:
        """The same for equal shapes."""
        try:
            return msgspec.json.encode(self, order="deterministic")
        except (TypeError, ValueError, RecursionError) as error:
            raise _refuse(f"structured_outputs.json is not JSON: {error}") from None


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="structured_outputs")


class Matcher(Protocol):
    """Follows one answer, and says what it may go on with."""

    @property
    def error(self) -> str:
        """Why it cannot go on, in words for the client; empty while it can."""
        ...

    def accept(self, token_ids: Sequence[int]) -> None:
        """The answer goes on with these."""
        ...

    def write_mask(self, address: int, num_bytes: int) -> None:
        """Write the ids that may follow to memory: bit i % 8 of byte i // 8 stands for id i.

        An end-of-sequence id may follow where the answer has its shape. None may after an error.
        """
        ...

    def copy(self) -> "Matcher":
        """One that goes its own way from here."""
        ...


class Grammars(Protocol):
    """Makes matchers, and takes its time in other threads."""

    def is_ready(self, params: StructuredOutputsParams) -> bool:
        """Whether `matcher` would not have to wait; the first question starts the work."""
        ...

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A new one, at the beginning of an answer."""
        ...
