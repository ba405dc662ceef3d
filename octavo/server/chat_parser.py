"""One answer of a chat, from text to events: first reasoning, then content with calls in it.

Composes the parsers that a request needs. Knows no HTTP.
"""

from collections.abc import Iterable, Sequence

from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Reply,
    Retraction,
)
from octavo.server.reasoning import ThinkParser
from octavo.server.tool_parsers import ToolParser

# Parsers copy what they have not read yet at every marker, so a text of markers only would take
# time that grows with the square of what they are given at once.
_SLICE_CHARS = 4096


class ChatParser:
    """Reads one answer.

    parallel: further calls are left out once one is complete, where this is False.
    """

    def __init__(
        self,
        reasoning: ThinkParser | None = None,
        tools: ToolParser | None = None,
        *,
        parallel: bool = True,
    ):
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel
        self._called = False  # one call is complete
        self._left_out: set[int] = set()

    def read(self, text: str) -> Reply:
        """A whole answer."""
        events: list[Event] = []
        for start in range(0, len(text), _SLICE_CHARS):
            events += self.feed(text[start : start + _SLICE_CHARS])
        return Reply.of(events + self.finish())

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer adds."""
        if self._reasoning is None:
            return self._beyond([Content(text)] if text else [])
        return self._beyond(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        """What is left when the answer is over."""
        events = self._beyond([] if self._reasoning is None else self._reasoning.finish())
        if self._tools is not None:
            events += self._allowed(self._tools.finish())
        return events

    def _beyond(self, events: Sequence[Content | Reasoning]) -> list[Event]:
        """Look for calls in the content."""
        found: list[Event] = []
        for event in events:
            if self._tools is not None and isinstance(event, Content):
                found += self._allowed(self._tools.feed(event.text))
            else:
                found.append(event)
        return found

    def _allowed(self, events: Iterable[Event]) -> list[Event]:
        """All events, or those that belong to one call at most."""
        if self._parallel:
            return list(events)
        allowed: list[Event] = []
        for event in events:
            match event:
                case CallStart(index) if self._called:
                    self._left_out.add(index)
                case CallArguments(index) | CallEnd(index) if index in self._left_out:
                    pass
                case Retraction(index, text) if index in self._left_out:
                    allowed.append(Content(text))
                case _:
                    self._called = self._called or isinstance(event, CallEnd)
                    allowed.append(event)
        return allowed
