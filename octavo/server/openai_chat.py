"""The shape of /v1/chat/completions: messages, deltas with a role first. Knows no engine."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from octavo.core import FinishReason
from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Retraction,
)
from octavo.server.chat_parser import ChatParser
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.openai_shape import MARK, ChoiceShape, ending
from octavo.server.response_shape import Piece, ShapeOptions, sse


class ChatShape(ChoiceShape):
    """A response of object `chat.completion`."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One finished answer."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, "message", message, piece=piece)

    def chunk_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of one answer; the last one says nothing but why it is the last."""
        delta = {} if piece.finish_reason is not None else {"content": piece.text}
        return self._choice(index, "delta", delta, piece=piece)

    def _choice(
        self, index: int, key: str, content: dict[str, Any], *, piece: Piece
    ) -> dict[str, Any]:
        logprobs = None
        if self.options.with_logprobs and (piece.logprobs or key == "message"):
            entries = self.logprobs.chat(piece.token_ids, piece.logprobs)
            logprobs = {"content": entries, "refusal": None}
        choice = {"index": index, key: content, "logprobs": logprobs} | ending(piece)
        if self.options.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def opening(self) -> bytes:
        """A frame for each choice with the role, as OpenAI sends it."""
        frames = b""
        for index in range(len(self.options.prompts) * self.options.num_per_prompt):
            delta = {"role": "assistant", "content": "", "refusal": None}
            chunk = self.chunk(self._choice(index, "delta", delta, piece=Piece()))
            if self.options.return_token_ids and index == 0:
                chunk["prompt_token_ids"] = self.options.prompts[0].token_ids
            frames += sse(chunk)
        return frames

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response, without streaming."""
        response = super().response(pieces, tallies)
        [prompt], num_top = self.options.prompts, self.options.num_prompt_logprobs
        if self.options.return_token_ids:
            response["prompt_token_ids"] = prompt.token_ids
        if num_top is not None and (scores := pieces[0].prompt_logprobs) is not None:
            response["prompt_logprobs"] = self.logprobs.prompt(prompt.token_ids, scores, num_top)
        return response


class ParsedChatShape(ChatShape):
    """The same where answers hold more than text: reasoning, calls of tools.

    Sole writer of one parser for each choice.
    """

    def __init__(
        self, options: ShapeOptions, logprobs: LogprobShaper, parser: Callable[[], ChatParser]
    ):
        super().__init__(options, logprobs)
        self._new_parser = parser
        self._parsers: dict[int, ChatParser] = {}  # of streams
        self._callers: set[int] = set()  # choices with a complete call
        self._text_frames: dict[tuple[int, type[Event]], list[bytes]] = {}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One finished answer, taken apart."""
        reply = self._new_parser().read(piece.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.content or None,
            "refusal": None,
        }
        if reply.reasoning:
            message |= _reasoning(reply.reasoning)
        if reply.calls:
            message["tool_calls"] = [
                _call_head(call.name, call.arguments) for call in reply.calls.values()
            ]
        choice = self._choice(index, "message", message, piece=piece)
        return choice | _calling(piece.finish_reason, bool(reply.calls))

    def frames(self, batch: Batch) -> bytes:
        """The frames of all events that the deltas make certain."""
        return b"".join([self._event_frames(index, delta) for index, delta in batch])

    def _event_frames(self, index: int, delta: TextDelta) -> bytes:
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._new_parser()
        events = parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += parser.finish()
        tokens = Piece(token_ids=list(delta.token_ids), logprobs=list(delta.logprobs or ()))
        frames = b""
        for event in events:
            if isinstance(event, CallEnd):
                self._callers.add(index)
            elif self._plain and isinstance(event, Content | Reasoning):
                frames += self._text_frame(index, event)
            elif fields := _delta_of(event):
                frames += self._delta_frame(index, fields, tokens)
                tokens = Piece()  # they go with the first frame
        if tokens.token_ids and not self._plain:
            frames += self._delta_frame(index, {}, tokens)
        if delta.finish_reason is not None:
            last = Piece(finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
            choice = self._choice(index, "delta", {}, piece=last)
            choice |= _calling(delta.finish_reason, index in self._callers)
            frames += sse(self.chunk(choice))
        return frames

    def _delta_frame(self, index: int, fields: dict[str, Any], tokens: Piece) -> bytes:
        return sse(self.chunk(self._choice(index, "delta", fields, piece=tokens)))

    def _text_frame(self, index: int, event: Content | Reasoning) -> bytes:
        """A frame in which only the text is new: nearly all are."""
        key = index, type(event)
        parts = self._text_frames.get(key)
        if parts is None:
            frame = self._delta_frame(index, _delta_of(type(event)(MARK)), Piece())
            parts = self._text_frames[key] = frame.split(orjson.dumps(MARK))
        return orjson.dumps(event.text).join(parts)


def chat_shape(
    options: ShapeOptions, logprobs: LogprobShaper, parser: Callable[[], ChatParser] | None
) -> ChatShape:
    """The shape for answers that `parser` reads, or for ones that are only text."""
    if parser is None:
        return ChatShape(options, logprobs)
    return ParsedChatShape(options, logprobs, parser)


def _delta_of(event: Event) -> dict[str, Any]:
    """What a stream says of an event; nothing of the end of a call."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case CallStart(index, name):
            return {"tool_calls": [{"index": index} | _call_head(name, "")]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case Retraction(_, _, unsent) if unsent:
            return {"content": unsent}  # what was told of the call cannot be taken back
        case _:
            return {}


def _reasoning(text: str) -> dict[str, str]:
    """Under both of the names that clients of vLLM know: the older one, and the newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _call_head(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _calling(reason: FinishReason | None, has_calls: bool) -> dict[str, str]:
    """The reason of an answer that ended by itself, to have tools called."""
    ends = has_calls and reason is FinishReason.STOP
    return {"finish_reason": "tool_calls"} if ends else {}
