"""The shape of /v1/completions: text choices, echo, four-list logprobs. Knows no engine."""

from typing import Any

from msgspec import structs

from octavo.core import TokenLogprobs
from octavo.server.answers import Batch
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.openai_shape import ChoiceShape, ending
from octavo.server.response_shape import Piece, ShapeOptions, sse


class CompletionShape(ChoiceShape):
    """A response of object `text_completion`; a chunk has the same object."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        echoes: list[str] | None = None,
        num_echo_logprobs: int | None = None,
    ):
        """`echoes` holds each prompt's text where it goes in front of the answers.

        `num_echo_logprobs`: the prompt's tokens come with their log-probabilities then, and with
        those of so many alternatives.
        """
        super().__init__(options, logprobs)
        self._echoes = echoes
        self._num_echo_logprobs = num_echo_logprobs
        num_choices = len(options.prompts) * options.num_per_prompt
        self._offsets = [0] * num_choices
        # The first answer to a prompt tells what all answers to it show.
        self._scores: dict[int, tuple[TokenLogprobs, ...]] = {}  # by index of the prompt
        self._unopened = set(range(num_choices))

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One finished answer."""
        self._note_scores(index, piece.prompt_logprobs)
        choice = self._choice(index, piece, echoes=True)
        if self.options.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index).token_ids
        num_top, scores = self.options.num_prompt_logprobs, self._scores_of(index)
        if num_top is not None and scores is not None:
            token_ids = self.prompt_of(index).token_ids
            choice["prompt_logprobs"] = self.logprobs.prompt(token_ids, scores, num_top)
        return choice

    def chunk_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of one answer."""
        return self._choice(index, piece)

    def _note_scores(self, index: int, scores: tuple[TokenLogprobs, ...] | None) -> None:
        if scores is not None:
            self._scores[index // self.options.num_per_prompt] = scores

    def _scores_of(self, index: int) -> tuple[TokenLogprobs, ...] | None:
        return self._scores.get(index // self.options.num_per_prompt)

    def _choice(self, index: int, piece: Piece, *, echoes: bool = False) -> dict[str, Any]:
        text, token_ids = piece.text, piece.token_ids
        entries: list[TokenLogprobs | None] = list(piece.logprobs)
        if echoes and self._echoes is not None:
            text = self._echoes[index // self.options.num_per_prompt] + text
            if echoed := self._echoed_logprobs(index):
                token_ids = [*self.prompt_of(index).token_ids, *token_ids]
                entries = [*echoed, *entries]
        logprobs = None
        if self.options.with_logprobs and entries:
            offset = self._offsets[index]
            logprobs = self.logprobs.completion(token_ids, entries, offset=offset)
            self._offsets[index] += self.logprobs.num_chars(token_ids)
        choice = {"index": index, "text": text, "logprobs": logprobs} | ending(piece)
        if self.options.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _echoed_logprobs(self, index: int) -> list[TokenLogprobs | None]:
        """Of the prompt's tokens, where they are wanted; the first follows nothing."""
        num_top, scores = self._num_echo_logprobs, self._scores_of(index)
        if num_top is None or scores is None:
            return []
        return [None, *(structs.replace(entry, top=entry.top[:num_top]) for entry in scores)]

    def opening(self) -> bytes:
        """A frame for each choice where the prompt, as text or as ids, has to be told."""
        if self._num_echo_logprobs is not None:
            return b""  # they come when the prompt is scored
        indices, self._unopened = sorted(self._unopened), set()
        return b"".join(self._opening_of(index) for index in indices)

    def _opening_of(self, index: int) -> bytes:
        if self._echoes is None and not self.options.return_token_ids:
            return b""
        choice = self._choice(index, Piece(), echoes=True)
        if self.options.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index).token_ids
        return sse(self.chunk(choice))

    def frames(self, batch: Batch) -> bytes:
        """The frames of all deltas that are ready."""
        if not self._unopened:
            return super().frames(batch)
        frames = b""
        for index, delta in batch:
            self._note_scores(index, delta.prompt_logprobs)
            if index in self._unopened:
                self._unopened.remove(index)
                frames += self._opening_of(index)
            frames += super().frames([(index, delta)])
        return frames
