"""Keeps users' text from turning into control tokens.

A tokenizer takes "<|im_end|>" for the control token wherever it stands. Octavo lets only the chat
template write control tokens. Two Unicode noncharacters, which no text may contain, do the work:

    BREAK  put into users' strings, behind the first character of whatever begins like a special
           token, before the template sees them; it travels with the text whatever the template
           does (trim, join, slice), so that what the template itself wrote can be told apart.
    MARK   the first character of every special token's name in a second tokenizer, for which the
           original spellings are plain text.

Text that spells no special token never meets the second tokenizer.
"""

import json
import re
from collections.abc import Mapping

import tokenizers

from octavo.errors import IntegrityError, RequestError
from octavo.text.pairs import TokenPair
from octavo.text.tokenizer_file import is_failure

BREAK = "\ufdd0"
MARK = "\ufdd1"
MAX_DEPTH = 64  # of the data in messages
NUM_TELLING_CHARS = 3  # of a special token's name; "<|i" is enough to be suspicious


class SpecialTokens:
    """Encodes text in which special tokens are spelled, each spelling taken for what it is."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        added = tokenizer.get_added_tokens_decoder()
        self.ids = frozenset(i for i, token in added.items() if token.special)
        names = sorted({added[i].content for i in self.ids}, key=len, reverse=True)
        # The tokenizer ignores empty names; "(?!)" matches nothing.
        spellings = "|".join(re.escape(name) for name in names if name) or "(?!)"
        self._spelled = re.compile(f"(?:{spellings})(?!{BREAK})")
        starts = {_start_pattern(name) for name in names if name}
        self._start = re.compile("|".join(sorted(starts)) or "(?!)")
        self._tokenizer = tokenizer
        self._marked: tokenizers.Tokenizer | None = None

    def encode_plain(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode a text in which no special token is meant."""
        tokenizer = self._tokenizer
        if self._spelled.search(text):
            tokenizer, text = self._marked_tokenizer(), _without_noncharacters(text)
        return _encode(tokenizer, text, add_special_tokens, param="prompt")

    def encode_pair(self, first: str, second: str) -> TokenPair:
        """Encode two texts, in which no special token is meant, into one prompt."""
        tokenizer = self._tokenizer
        if self._spelled.search(first) or self._spelled.search(second):
            tokenizer = self._marked_tokenizer()
            first, second = _without_noncharacters(first), _without_noncharacters(second)
        encoding = _encoding(tokenizer, first, second, param="prompt")
        return TokenPair(encoding.ids, encoding.type_ids, encoding.sequence_ids)

    def encode_rendered(self, rendered: str) -> list[int]:
        """Encode what a chat template wrote about messages that went through `shield`."""
        tokenizer = self._tokenizer
        text = rendered.replace(BREAK, "")
        marked = self._mark(rendered).replace(BREAK, "")
        if marked != self._mark(text):
            tokenizer, text = self._marked_tokenizer(), marked
        return _encode(tokenizer, text, False, param="messages")

    def shield(self, value: object, depth: int = 0) -> object:
        """A copy of JSON-like data, fit for a template, with a BREAK in all suspicious text.

        Raises:
            RequestError: the data is nested too deeply or is not JSON-like.
        """
        if isinstance(value, str):
            return self._start.sub(rf"\g<0>{BREAK}", _without_noncharacters(value))
        # The exact types: a subclass might bring methods that a template could call.
        if value is None or type(value) in (bool, int, float):
            return value
        if depth == MAX_DEPTH:
            raise RequestError("the messages are nested too deeply", param="messages")
        if isinstance(value, Mapping):
            return {
                self.shield(key, depth + 1): self.shield(item, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.shield(item, depth + 1) for item in value]
        raise RequestError("messages may hold only what JSON can express", param="messages")

    def _mark(self, text: str) -> str:
        return self._spelled.sub(rf"{MARK}\g<0>", text)

    def _marked_tokenizer(self) -> tokenizers.Tokenizer:
        # Built when it is first needed, in about twice the time of loading a tokenizer. Two
        # threads may both build one; they build the same.
        if self._marked is None:
            try:
                self._marked = _with_marked_names(self._tokenizer)
            except BaseException as error:
                if not is_failure(error):
                    raise
                # Such as a special token that merges are made of, too. All other text is fine.
                raise RequestError(
                    "the model's tokenizer cannot take the names of its special tokens for text",
                    param="prompt",
                ) from error
        return self._marked


def _encode(
    tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool, *, param: str
) -> list[int]:
    encoding = _encoding(tokenizer, text, add_special_tokens=add_special_tokens, param=param)
    return list(encoding.ids)


def _encoding(
    tokenizer: tokenizers.Tokenizer,
    text: str,
    second: str | None = None,
    *,
    add_special_tokens: bool = True,
    param: str,
) -> tokenizers.Encoding:
    try:
        encoding = tokenizer.encode(text, second, add_special_tokens=add_special_tokens)
    except BaseException as error:
        if not is_failure(error):
            raise
        # Such as a regular expression that gives up. Its words may quote the text: not shown.
        raise RequestError("the model's tokenizer fails on this text", param=param) from error
    return encoding


def _start_pattern(name: str) -> str:
    """A pattern for the first character of text that begins like `name`.

    At the end of a text less of the name is enough, since the template may put more behind it.
    """
    head, rest = re.escape(name[0]), name[1:NUM_TELLING_CHARS]
    if not rest:
        return head
    shorter = f"{re.escape(rest[:-1])}?" if len(rest) > 1 else ""
    return rf"{head}(?={re.escape(rest)}|{shorter}\s*\Z)"


def _without_noncharacters(text: str) -> str:
    return text.replace(BREAK, "\ufffd").replace(MARK, "\ufffd")


def _with_marked_names(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, where special tokens are called MARK + name."""
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    renamed = {}
    for token in spec["added_tokens"]:
        if token["special"]:
            name = token["content"]
            renamed[name] = token["content"] = MARK + name
            if isinstance(vocabulary, dict) and name in vocabulary:
                vocabulary[MARK + name] = vocabulary.pop(name)
    if isinstance(vocabulary, list):  # of Unigram: tokens with their scores, in the order of ids
        spec["model"]["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
    unknown = spec["model"].get("unk_token")
    spec["model"]["unk_token"] = renamed.get(unknown, unknown)
    marked = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if any(tokenizer.token_to_id(name) != marked.token_to_id(renamed[name]) for name in renamed):
        raise IntegrityError("renaming the special tokens changed their ids")
    return marked
