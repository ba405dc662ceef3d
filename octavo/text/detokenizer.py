"""Token ids to text, a few at a time, without ever showing half a character.

The text of a model is the UTF-8 reading of its tokens' bytes, one after the other. So the whole
state is one incremental UTF-8 decoder: each token costs the same however long the answer is, and
the pieces always add up to what `decode` gives for all ids at once.
"""

import codecs
from collections.abc import Iterable

from octavo.text.interface import Tokenizer


class IncrementalDetokenizer:
    """The text of one growing answer. Not shared between answers."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        # Holds back the bytes of an unfinished character; bytes that can no longer become one
        # turn into U+FFFD at once.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_leading_space

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete; it may be empty while a character is unfinished."""
        skipped = self._skipped
        data = b"".join([self._token_bytes(i) for i in token_ids if i not in skipped])
        return self._begin(self._utf8.decode(data))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where the last character was never finished."""
        return self._begin(self._utf8.decode(b"", final=True))

    def _begin(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
