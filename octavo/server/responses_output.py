"""The output of one response, item by item, and the typed events that tell of it.

From a chat's events to items (reasoning, message, function calls) and OpenAI's events. Knows no
engine, no HTTP and no response around the output.
"""

import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Retraction,
)

Item = dict[str, Any]


class EventWriter:
    """Numbers the events of a stream."""

    def __init__(self) -> None:
        self._num_events = 0

    def event(self, kind: str, fields: Item) -> bytes:
        """One typed event."""
        payload = {"type": kind, "sequence_number": self._num_events} | fields
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(payload) + b"\n\n"


class Output:
    """The items so far. One of them is open at a time; the next one closes it."""

    def __init__(self, writer: EventWriter):
        self.items: list[Item] = []
        self._writer = writer
        self._open: Item | None = None
        self._text: list[str] = []  # of the open item
        self._calls: dict[int, Item] = {}  # by the parser's index

    def take(self, events: Sequence[Event]) -> bytes:
        """Grow by what the parser found; returns the frames that tell of it."""
        return b"".join([self._take(event) for event in events])

    def _take(self, event: Event) -> bytes:
        match event:
            case Content(text) if text:
                return self._in_item("message") + self._delta("output_text", text)
            case Reasoning(text) if text:
                return self._in_item("reasoning") + self._delta("reasoning_text", text)
            case CallStart(index, name):
                frames = self._close("completed") + self._begin(_call_item(name))
                self._calls[index] = self.items[-1]
                return frames
            case CallArguments(index, text) if self._calls[index] is self._open:
                self._text.append(text)
                return self._event("function_call_arguments.delta", {"delta": text})
            case CallEnd(index) if self._calls[index] is self._open:
                return self._close("completed")
            case Retraction(index, _, unsent):
                # A stream has told of the call: it stays, as one that never came to its end.
                frames = b"" if self._calls[index] is not self._open else self._close("incomplete")
                return frames + self._take(Content(unsent))
            case _:
                return b""

    def finish(self, status: str) -> bytes:
        """Close what is open. An answer without a word is an empty message."""
        frames = b"" if self.items else self._in_item("message")
        return frames + self._close(status)

    def _in_item(self, kind: str) -> bytes:
        """Make sure that the open item is of this type."""
        if self._open is not None and self._open["type"] == kind:
            return b""
        frames = self._close("completed")
        if kind == "message":
            return frames + self._begin(_message_item(), _text_part(""))
        return frames + self._begin(_reasoning_item(), _reasoning_part(""))

    def _begin(self, item: Item, part: Item | None = None) -> bytes:
        self._open = item
        self._text = []
        self.items.append(item)
        place = {"output_index": len(self.items) - 1}
        frames = self._writer.event("response.output_item.added", place | {"item": item})
        if part is not None:
            frames += self._event("content_part.added", {"content_index": 0, "part": part})
        return frames

    def _delta(self, kind: str, text: str) -> bytes:
        self._text.append(text)
        fields: Item = {"content_index": 0, "delta": text}
        if kind == "output_text":
            fields["logprobs"] = []
        return self._event(f"{kind}.delta", fields)

    def _close(self, status: str) -> bytes:
        item = self._open
        if item is None:
            return b""
        text = "".join(self._text)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            fields: Item = {"arguments": text, "name": item["name"]}
            is_whole = status == "completed"
            frames = self._event("function_call_arguments.done", fields) if is_whole else b""
        else:
            is_message = item["type"] == "message"
            part = _text_part(text) if is_message else _reasoning_part(text)
            item["content"] = [part]
            fields = {"content_index": 0, "text": text} | ({"logprobs": []} if is_message else {})
            frames = self._event(f"{part['type']}.done", fields)
            frames += self._event("content_part.done", {"content_index": 0, "part": part})
        place = {"output_index": len(self.items) - 1}
        frames += self._writer.event("response.output_item.done", place | {"item": item})
        self._open = None
        return frames

    def _event(self, kind: str, fields: Item) -> bytes:
        """An event of the item that was begun last."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self._writer.event(f"response.{kind}", place | fields)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _message_item() -> Item:
    return {
        "id": _id("msg"),
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _reasoning_item() -> Item:
    return {
        "id": _id("rs"),
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [],
    }


def _call_item(name: str) -> Item:
    return {
        "id": _id("fc"),
        "type": "function_call",
        "status": "in_progress",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": name,
        "arguments": "",
    }


def _text_part(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_part(text: str) -> Item:
    return {"type": "reasoning_text", "text": text}
