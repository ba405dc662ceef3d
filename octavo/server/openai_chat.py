"""The shape of /v1/chat/completions: messages, deltas with a role first. Knows no engine."""

from collections.abc import Sequence
from typing import Any

from octavo.server.answers import Tally
from octavo.server.openai_shape import Piece, Shape, ending, sse


class ChatShape(Shape):
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
        if self.options.return_token_ids:
            response["prompt_token_ids"] = self.options.prompts[0].token_ids
        return response
