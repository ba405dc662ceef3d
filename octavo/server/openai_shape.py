"""What OpenAI's two kinds of completions share: choices, chunks of them, usage.

A subclass of `ChoiceShape` says how one choice looks, whole and as a piece.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import orjson

from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import DONE, Piece, Shape, ShapeOptions, sse

MARK = "\x00text\x00"  # stands for the text in a template; no model name has it
_MARK_JSON = orjson.dumps(MARK)


class ChoiceShape(Shape):
    """One response that is a list of choices, or a stream of chunks of them."""

    object: str
    chunk_object: str

    def __init__(self, options: ShapeOptions, logprobs: LogprobShaper):
        super().__init__(options, logprobs)
        self._plain = not (options.with_logprobs or options.return_token_ids)
        self._templates: dict[int, tuple[bytes, bytes]] = {}

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One finished answer."""

    @abstractmethod
    def chunk_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of one answer."""

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response, without streaming."""
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return self._head(self.object) | {"choices": choices, "usage": self._usage(tallies)}

    def frames(self, batch: Batch) -> bytes:
        """The frames of all deltas that are ready."""
        return b"".join([self._frame(index, delta) for index, delta in batch])

    def _frame(self, index: int, delta: TextDelta) -> bytes:
        silent = not delta.text and (self.options.has_text or not delta.token_ids)
        if self._plain and delta.finish_reason is None:  # nearly all: only the text differs
            if silent:
                return b""
            head, tail = self._templates.get(index) or self._template(index)
            return head + orjson.dumps(delta.text) + tail
        frame = b""
        if not silent or (delta.token_ids and not self._plain):
            piece = Piece.joined([delta])
            piece.finish_reason = piece.stop_reason = None
            frame = sse(self.chunk(self.chunk_choice(index, piece)))
        if delta.finish_reason is not None:
            last = Piece(finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
            frame += sse(self.chunk(self.chunk_choice(index, last)))
        return frame

    def _template(self, index: int) -> tuple[bytes, bytes]:
        """A frame, cut where the text goes: made by the slow path, so both look the same."""
        frame = sse(self.chunk(self.chunk_choice(index, Piece(MARK))))
        head, _, tail = frame.partition(_MARK_JSON)
        self._templates[index] = head, tail
        return head, tail

    def closing(self, tallies: Sequence[Tally]) -> bytes:
        """The frames after the last text."""
        if not self.options.include_usage:
            return DONE
        chunk = self._head(self.chunk_object) | {"choices": [], "usage": self._usage(tallies)}
        return sse(chunk) + DONE

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream around one choice."""
        chunk = self._head(self.chunk_object) | {"choices": [choice]}
        if self.options.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.options.model,
        }

    def _usage(self, tallies: Sequence[Tally]) -> dict[str, Any]:
        num_prompt = sum(len(prompt.token_ids) for prompt in self.options.prompts)
        num_completion = sum(tally.num_tokens for tally in tallies)
        # A prompt counts once, however many answers it has.
        firsts = tallies[:: self.options.num_per_prompt]
        num_cached = sum(tally.num_cached_tokens for tally in firsts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }


def ending(piece: Piece) -> dict[str, Any]:
    """How a choice says that it is over. `stop_reason` is vLLM's: which stop string or token."""
    fields: dict[str, Any] = {"finish_reason": piece.finish_reason}
    if piece.stop_reason is not None:
        fields["stop_reason"] = piece.stop_reason
    return fields
