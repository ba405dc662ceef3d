"""Finds the calls of tools in an answer, while it arrives or whole. Knows no HTTP.

Two formats: calls between markers, as Hermes and Qwen write them, and an answer that is nothing but
JSON, as Llama 3.1 writes it. What is no proper call of a known tool stays text; nothing is lost.
A parser reads one answer.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from typing import Any

import msgspec

from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Retraction,
    num_held_back,
)

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

# Nearly all calls begin like this. The bounds keep a look at it cheap while it grows.
_MAX_HEAD_CHARS = 256
_HEAD = re.compile(
    r"""\s{0,8}\{\s{0,8}"name"\s{0,8}:\s{0,8}"([^"\\]{1,64})"\s{0,8},"""
    r"""\s{0,8}"(?:arguments|parameters)"\s{0,8}:\s{0,8}(?=\{)"""
)

_SPACE = " \t\n\r"
_SCALARS = frozenset("0123456789+-.eEtrufalsn,:" + _SPACE)  # what JSON has outside of strings
_CLOSING = {"{": "}", "[": "]"}


class _CallFields(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


_CALL = msgspec.json.Decoder(_CallFields)
_CALLS = msgspec.json.Decoder(list[_CallFields])
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_NOT_JSON = (msgspec.MsgspecError, RecursionError)


class JsonScanner:
    """Finds the end of one JSON value, or the first character that no JSON could have there.

    What it takes is balanced, not proved to be valid: that is the decoder's work, at the end.
    """

    def __init__(self, openers: str = "{"):
        self.is_done = False
        self.is_wrong = False
        self._openers = openers  # the brackets that the value may begin with
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False

    @property
    def is_over(self) -> bool:
        """Nothing more is taken."""
        return self.is_done or self.is_wrong

    def scan(self, text: str) -> int:
        """Take the next piece; returns how many characters of it belong to the value."""
        if self.is_over:
            return 0
        for at, char in enumerate(text):
            if self._in_string:
                self.is_wrong = char < " "  # a line break would have to be escaped
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            else:
                self.is_wrong = not self._step(char)
            if self.is_wrong:
                return at
            if self.is_done:
                return at + 1
        return len(text)

    def _step(self, char: str) -> bool:
        """One character outside of strings; False where it cannot stand there."""
        if not self._closers:
            if char in self._openers:
                self._closers.append(_CLOSING[char])
            return char in self._openers or char in _SPACE
        if char == '"':
            self._in_string = True
        elif char in _CLOSING:
            self._closers.append(_CLOSING[char])
        elif char == self._closers[-1]:
            self._closers.pop()
            self.is_done = not self._closers
        else:
            return char in _SCALARS
        return True


class ToolParser(ABC):
    """Reads one answer. `names` are those of the tools that may be called."""

    def __init__(self, names: Set[str]):
        self._names = names

    @abstractmethod
    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer adds."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """What is left when the answer is over."""

    def _checked(self, fields: _CallFields) -> tuple[str, str] | None:
        """Name and arguments of a call; None where it is not a proper one."""
        text = bytes(fields.arguments or fields.parameters).decode()
        try:
            if text.startswith('"'):  # some models write the arguments as JSON within a string
                text = msgspec.json.decode(text, type=str)
            _OBJECT.decode(text)
        except _NOT_JSON:
            return None
        return (fields.name, text) if fields.name in self._names else None


class HermesParser(ToolParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number, with text around them.

    Arguments are passed on while they arrive. White space beside a call is layout: it is shown
    only between two texts.
    """

    def __init__(self, names: Set[str]):
        super().__init__(names)
        self._pending = ""  # not read yet: it may become a marker, or layout before one
        self._call: _OpenCall | None = None
        self._num_calls = 0
        self._has_content = False
        self._after_call = False

    def feed(self, text: str) -> list[Event]:
        self._pending += text
        events: list[Event] = []
        while self._read_call(events) if self._call else self._read_text(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        left, self._pending = self._pending, ""
        if self._call is not None:
            self._give_up(events, left)
        elif left.strip() or not self._after_call:
            self._show(events, left)
        return events

    def _read_text(self, events: list[Event]) -> bool:
        """Pass text on up to the next call; True where one begins."""
        text, marker, rest = self._pending.partition(OPEN)
        shown = text[: len(text) - (0 if marker else num_held_back(text, OPEN))].rstrip()
        self._show(events, shown)
        if not marker:
            self._pending = text[len(shown) :]
            return False
        self._call = _OpenCall(self._num_calls, self._names, text[len(shown) :] + OPEN)
        self._pending = rest
        return True

    def _show(self, events: list[Event], text: str) -> None:
        if self._after_call and not self._has_content:
            text = text.lstrip()
        if text:
            events.append(Content(text))
            self._has_content, self._after_call = True, False

    def _read_call(self, events: list[Event]) -> bool:
        """Read on in the open call; True where it is over."""
        call = self._call
        if call is None:
            return False
        self._pending = self._pending[call.take(self._pending, events) :]
        if not call.is_wrong:
            rest = self._pending.lstrip()
            if not call.is_read or CLOSE.startswith(rest) and rest != CLOSE:
                return False
            if rest.startswith(CLOSE) and call.close(self._check, events):
                self._pending = rest.removeprefix(CLOSE)
                self._call, self._after_call = None, True
                self._num_calls += 1
                return True
        self._give_up(events)
        return True

    def _check(self, text: str) -> tuple[str, str] | None:
        try:
            return self._checked(_CALL.decode(text))
        except _NOT_JSON:
            return None

    def _give_up(self, events: list[Event], left: str = "") -> None:
        """The open call is none; `left` is the rest of the answer, where that is over."""
        if self._call is None:
            return
        events.append(self._call.undone(left))
        self._num_calls += self._call.has_started
        self._call, self._has_content, self._after_call = None, True, False


class _OpenCall:
    """One call between markers, while it arrives."""

    def __init__(self, index: int, names: Set[str], lead: str):
        self._index = index
        self._names = names
        self._lead = lead  # the marker, and the layout before it
        self._body = ""
        self._scanner = JsonScanner()
        self._name: str | None = None  # once it is told
        self._may_start = True
        self._arguments = JsonScanner()
        self._begin = self._end = 0  # of what is told of the arguments, in the body

    @property
    def is_wrong(self) -> bool:
        return self._scanner.is_wrong

    @property
    def is_read(self) -> bool:
        return self._scanner.is_done

    @property
    def has_started(self) -> bool:
        return self._name is not None

    def take(self, text: str, events: list[Event]) -> int:
        """Read the JSON on; returns how many characters of `text` belong to it."""
        num_chars = self._scanner.scan(text)
        self._body += text[:num_chars]
        if self._may_start:
            self._start(events)
        if self.has_started:
            self._tell(self._arguments.scan(self._body[self._end :]), events)
        return num_chars

    def _start(self, events: list[Event]) -> None:
        """Tell of the call as soon as its name is known, and its arguments come next."""
        head = _HEAD.match(self._body[:_MAX_HEAD_CHARS])
        if head is not None and head[1] in self._names:
            self._name = head[1]
            self._begin = self._end = head.end()
            events.append(CallStart(self._index, self._name))
        self._may_start = head is None and len(self._body) < _MAX_HEAD_CHARS

    def _tell(self, num_chars: int, events: list[Event]) -> None:
        if num_chars:
            events.append(CallArguments(self._index, self._body[self._end :][:num_chars]))
            self._end += num_chars

    def close(self, check: Callable[[str], tuple[str, str] | None], events: list[Event]) -> bool:
        """The closing marker has come; False where the call turns out to be none."""
        found = check(self._body)
        if found is None:
            return False
        name, arguments = found
        if not self.has_started:
            events += [CallStart(self._index, name), CallArguments(self._index, arguments)]
        elif found != (self._name, self._body[self._begin : self._end]):
            return False  # a key came twice
        events.append(CallEnd(self._index))
        return True

    def undone(self, left: str) -> Event:
        """The text of a call that is none, and of what comes after it."""
        text = self._lead + self._body + left
        if not self.has_started:
            return Content(text)
        return Retraction(self._index, text, self._body[self._end :] + left)


class JsonParser(ToolParser):
    """An answer that is one object `{"name": …, "parameters": {…}}`, or a list of them.

    Nothing of it is told before it is over: until then it may be an answer in JSON.
    """

    def __init__(self, names: Set[str]):
        super().__init__(names)
        self._held = ""
        self._scanner = JsonScanner("{[")
        self._is_text = False

    def feed(self, text: str) -> list[Event]:
        if self._is_text:
            return [Content(text)] if text else []
        rest = text[self._scanner.scan(text) :]
        self._held += text
        self._is_text = self._scanner.is_wrong or bool(rest.strip())
        return self._release() if self._is_text else []

    def finish(self) -> list[Event]:
        calls = self._calls() if self._scanner.is_done and not self._is_text else []
        if not calls:
            return self._release()
        events: list[Event] = []
        for index, (name, arguments) in enumerate(calls):
            events += [CallStart(index, name), CallArguments(index, arguments), CallEnd(index)]
        return events

    def _release(self) -> list[Event]:
        held, self._held = self._held, ""
        return [Content(held)] if held else []

    def _calls(self) -> list[tuple[str, str]]:
        """All of them, or none where one is wrong."""
        is_list = self._held.lstrip().startswith("[")
        try:
            found = _CALLS.decode(self._held) if is_list else [_CALL.decode(self._held)]
        except _NOT_JSON:
            return []
        calls = [self._checked(fields) for fields in found]
        return [call for call in calls if call is not None] if None not in calls else []


TOOL_PARSERS: dict[str, type[ToolParser]] = {"hermes": HermesParser, "json": JsonParser}
