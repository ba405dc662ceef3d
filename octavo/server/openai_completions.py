"""The shape of /v1/completions: text choices, echo, four-list logprobs. Knows no engine."""

from typing import Any

from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.openai_shape import ChoiceShape, ending
from octavo.server.response_shape import Piece, ShapeOptions, sse


class CompletionShape(ChoiceShape):
    """A response of object `text_completion`; a chunk has the same object."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self, options: ShapeOptions, logprobs: LogprobShaper, *, echoes: list[str] | None = None
    ):
        """`echoes` holds each prompt's text where it goes in front of the answers."""
        super().__init__(options, logprobs)
        self._echoes = echoes
        self._offsets = [0] * (len(options.prompts) * options.num_per_prompt)

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self.options.num_per_prompt]

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One finished answer."""
        choice = self._choice(index, piece)
        choice["text"] = self._echo(index) + piece.text
        if self.options.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index).token_ids
        return choice

    def chunk_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of one answer."""
        return self._choice(index, piece)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.options.with_logprobs and piece.logprobs:
            offset = self._offsets[index]
            logprobs = self.logprobs.completion(piece.token_ids, piece.logprobs, offset=offset)
            self._offsets[index] += self.logprobs.num_chars(piece.token_ids)
        choice = {"index": index, "text": piece.text, "logprobs": logprobs} | ending(piece)
        if self.options.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def opening(self) -> bytes:
        """A frame for each choice where the prompt, as text or as ids, has to be told."""
        if self._echoes is None and not self.options.return_token_ids:
            return b""
        frames = b""
        for index in range(len(self._offsets)):
            choice = self._choice(index, Piece(self._echo(index)))
            if self.options.return_token_ids:
                choice["prompt_token_ids"] = self.prompt_of(index).token_ids
            frames += sse(self.chunk(choice))
        return frames
