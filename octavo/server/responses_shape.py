"""The shape of OpenAI's Responses API: one document, whose states a stream tells as typed events.

Knows no engine, no sockets and no store: `keep` gets the document at every change of its status.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.core import FinishReason, SamplingParams
from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Reply,
)
from octavo.server.chat_parser import ChatParser
from octavo.server.errors import ErrorReply
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import Piece, Shape, ShapeOptions
from octavo.server.responses_output import EventWriter, Output
from octavo.server.responses_protocol import (
    RUNNING,
    ResponsesRequest,
    ResponseTool,
    ResponseToolChoice,
)

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerReader:
    """How the one answer is read: what parses it, and what counts the tokens of a text."""

    parser: ChatParser
    count_tokens: Callable[[str], int]


class ResponsesShape(Shape):
    """A response of object `response`. Sole writer of its document."""

    id_prefix = "resp_"

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        settings: Document,
        reader: AnswerReader,
        keep: Callable[[Document], None],
    ):
        """settings: what the document says of the request."""
        super().__init__(options, logprobs)
        self._settings = settings
        self._reader = reader
        self._keep = keep
        self._writer = EventWriter()
        self._output = Output(self._writer)
        self._status = "queued"
        self._more: Document = {"error": None, "incomplete_details": None, "usage": None}
        self._reason: FinishReason | None = None

    def document(self) -> Document:
        """The response as it is now."""
        head = {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "model": self.options.model,
            "output": self._output.items,
        }
        return head | self._more | self._settings

    def opening(self) -> bytes:
        """Two events, both before the first text."""
        self._status = "in_progress"
        self._keep(self.document())
        fields = {"response": self.document()}
        frames = self._writer.event("response.created", fields)
        return frames + self._writer.event("response.in_progress", fields)

    def frames(self, batch: Batch) -> bytes:
        """The frames of all events that the deltas make certain."""
        return b"".join([self._frames_of(delta) for _, delta in batch])

    def _frames_of(self, delta: TextDelta) -> bytes:
        self._reason = delta.finish_reason or self._reason
        parser = self._reader.parser
        events = parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += parser.finish()
        return self._output.take(events)

    def closing(self, tallies: Sequence[Tally]) -> bytes:
        """The end of what is open, and of the response."""
        frames = self._finish(tallies)
        return frames + self._event_of_status()

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> Document:
        """The whole response, without streaming."""
        [piece] = pieces
        self._reason = piece.finish_reason
        self._output.take(_events_of(self._reader.parser.read(piece.text)))
        self._finish(tallies)
        return self.document()

    def _finish(self, tallies: Sequence[Tally]) -> bytes:
        is_cut = self._reason is FinishReason.LENGTH
        self._status = "incomplete" if is_cut else "completed"
        frames = self._output.finish(self._status)
        if is_cut:
            self._more["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._more["completed_at"] = int(time.time())
        self._more["usage"] = self._usage(tallies)
        self._keep(self.document())
        return frames

    def failure(self, reply: ErrorReply) -> bytes:
        """The response failed: by itself, or because it was refused without a reader."""
        self._status = "failed"
        frames = self._close_early()
        code = reply.code or reply.type
        self._more["error"] = {"code": code, "message": reply.message}
        self._keep(self.document())
        return frames + self._event_of_status()

    def cancel(self) -> None:
        """Nobody wants the response any more; what there is of it stays, and all of a whole one."""
        if self._status not in RUNNING:
            return
        self._status = "cancelled"
        self._close_early()
        self._keep(self.document())

    def _close_early(self) -> bytes:
        return self._output.finish("incomplete") if self._output.items else b""

    def _event_of_status(self) -> bytes:
        return self._writer.event(f"response.{self._status}", {"response": self.document()})

    def _usage(self, tallies: Sequence[Tally]) -> Document:
        [tally], [prompt] = tallies, self.options.prompts
        num_input = len(prompt.token_ids)
        thoughts = [
            part["text"]
            for item in self._output.items
            if item["type"] == "reasoning"
            for part in item["content"]
        ]
        # The tags, and how the text was cut into tokens, are lost by now: within a few tokens.
        num_thought = min(tally.num_tokens, sum(map(self._reader.count_tokens, thoughts)))
        return {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": tally.num_cached_tokens,
                "cache_write_tokens": 0,  # nothing is charged for keeping a prefix
            },
            "output_tokens": tally.num_tokens,
            "output_tokens_details": {"reasoning_tokens": num_thought},
            "total_tokens": num_input + tally.num_tokens,
        }


def settings_of(fields: ResponsesRequest, sampling: SamplingParams) -> Document:
    """What a document says of its request, with the defaults filled in."""
    choice: object = fields.tool_choice or "auto"
    if isinstance(choice, ResponseToolChoice):
        choice = {"type": choice.type, "name": choice.name}
    return {
        "background": bool(fields.background),
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "reasoning": fields.reasoning or {"effort": None, "summary": None},
        "service_tier": "default",
        "store": fields.is_stored,
        "temperature": sampling.temperature,
        "text": {"format": _format(fields), "verbosity": "medium"},
        "tool_choice": choice,
        "tools": [_tool(tool) for tool in fields.tools or ()],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": fields.truncation or "disabled",
    }


def _format(fields: ResponsesRequest) -> Document:
    form = None if fields.text is None else fields.text.format
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    return {
        "type": form.type,
        "name": form.name or "",
        "description": form.description,
        "schema": form.schema,
        "strict": bool(form.strict),
    }


def _tool(tool: ResponseTool) -> Document:
    return {
        "type": tool.type,
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _events_of(reply: Reply) -> list[Event]:
    """A whole answer in the order in which it is shown."""
    events: list[Event] = [Reasoning(reply.reasoning), Content(reply.content)]
    for index, call in reply.calls.items():
        events += [CallStart(index, call.name), CallArguments(index, call.arguments)]
        events.append(CallEnd(index))
    return events
