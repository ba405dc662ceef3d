"""Splits an answer into what the model thought and what it says: `<think>…</think>` at its start.

A pure state machine over text. Tags further on are text: an answer may be about tags.
"""

from enum import Enum, auto

from octavo.server.chat_events import Content, Reasoning, num_held_back

OPEN = "<think>"
CLOSE = "</think>"


class _At(Enum):
    START = auto()
    REASONING = auto()
    BREAK = auto()  # between the closing tag and the first character of the content
    CONTENT = auto()


class ThinkParser:
    """Reads one answer. White space beside the tags is layout, and not shown."""

    def __init__(self, *, opened: bool = False):
        """opened: the prompt ends with the opening tag, so the answer begins inside."""
        self._opened = opened
        self._at = _At.START
        self._pending = ""  # what cannot be told yet
        self._has_thought = False

    def feed(self, text: str) -> list[Content | Reasoning]:
        """What the next piece of the answer adds."""
        self._pending += text
        events: list[Content | Reasoning] = []
        if self._at is _At.START:
            self._start()
        if self._at is _At.REASONING:
            thought = self._think()
            if thought:
                events.append(Reasoning(thought))
        if self._at is _At.BREAK:
            self._pending = self._pending.lstrip()
            self._at = _At.CONTENT if self._pending else _At.BREAK
        if self._at is _At.CONTENT and self._pending:
            events.append(Content(self._pending))
            self._pending = ""
        return events

    def _start(self) -> None:
        """Decide where the answer begins, as soon as that can be told."""
        begin = self._pending.lstrip()
        if begin.startswith(OPEN):
            self._pending = begin.removeprefix(OPEN)
            self._at = _At.REASONING
        elif not OPEN.startswith(begin):
            self._at = _At.REASONING if self._opened else _At.CONTENT

    def _think(self) -> str:
        """Take the reasoning that is sure to be some."""
        if not self._has_thought:
            self._pending = self._pending.lstrip()
        thought, tag, rest = self._pending.partition(CLOSE)
        if tag:
            self._pending = rest
            self._at = _At.BREAK
            return thought.rstrip()
        kept = num_held_back(thought, CLOSE)
        shown = thought[: len(thought) - kept].rstrip()
        self._pending = thought[len(shown) :]
        self._has_thought = self._has_thought or bool(shown)
        return shown

    def finish(self) -> list[Content | Reasoning]:
        """What is left when the answer is over."""
        left, self._pending = self._pending, ""
        if not left:
            return []
        if self._at is _At.REASONING or (self._at is _At.START and self._opened):
            return [Reasoning(left)]
        return [Content(left)]
