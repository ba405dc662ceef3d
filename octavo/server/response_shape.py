"""The shape of a response, whatever the surface: its id, its document, the frames of its stream.

Knows no engine and no sockets.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from octavo.core import FinishReason, TokenLogprobs
from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.errors import ErrorReply
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.prompts import Prompt

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Piece:
    """A part of one answer, or all of it: what a choice is shaped from."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of all prompt tokens but the first
    vector: bytes = b""

    @classmethod
    def joined(cls, deltas: Sequence[TextDelta]) -> "Piece":
        """The pieces of one answer, in order, as one."""
        piece = cls("".join(delta.text for delta in deltas))
        for delta in deltas:
            piece.token_ids.extend(delta.token_ids)
            piece.logprobs.extend(delta.logprobs or ())
            piece.finish_reason = delta.finish_reason or piece.finish_reason
            if delta.prompt_logprobs is not None:
                piece.prompt_logprobs = delta.prompt_logprobs
            piece.vector = delta.vector or piece.vector
            piece.stop_reason = (
                piece.stop_reason if delta.stop_reason is None else delta.stop_reason
            )
        return piece


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOptions:
    """What a request asked of the form of its response."""

    model: str
    prompts: Sequence[Prompt]
    num_per_prompt: int
    with_logprobs: bool
    num_prompt_logprobs: int | None = None  # alternatives of each prompt token in vLLM's field
    return_token_ids: bool
    include_usage: bool
    has_text: bool = True  # without a tokenizer, each token is a chunk of its own, its text empty


def sse(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class Shape(ABC):
    """One response, as one JSON document or as a stream of events."""

    id_prefix: str

    def __init__(self, options: ShapeOptions, logprobs: LogprobShaper):
        self.id = self.id_prefix + uuid.uuid4().hex
        self.options = options
        self.logprobs = logprobs
        self._created = int(time.time())

    @abstractmethod
    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response, without streaming."""

    @abstractmethod
    def frames(self, batch: Batch) -> bytes:
        """The frames of all deltas that are ready."""

    def opening(self) -> bytes:
        """The frames before the first text."""
        return b""

    def closing(self, tallies: Sequence[Tally]) -> bytes:
        """The frames after the last text."""
        return b""

    def failure(self, reply: ErrorReply) -> bytes:
        """The frames of a stream that fails after it has begun: its last ones."""
        return b"data: " + reply.body() + b"\n\n" + DONE

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that a choice answers."""
        return self.options.prompts[index // self.options.num_per_prompt]
