"""The shapes of Hugging Face's Text Generation Inference: one answer, or an event for each token.

Knows no engine and no sockets.
"""

from collections.abc import Sequence
from typing import Any

from octavo.core import FinishReason
from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import Piece, Shape, ShapeOptions, sse


class TGIShape(Shape):
    """`generated_text`, with `details` where they were asked for.

    prefix: the prompt's text, where it goes in front of the answer (`return_full_text`).
    """

    id_prefix = "tgi-"

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        seed: int | None,
        with_details: bool,
        prefix: str = "",
    ):
        super().__init__(options, logprobs)
        self._seed = seed
        self._with_details = with_details
        self._prefix = prefix
        self._text: list[str] = []
        self._num_tokens = 0

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The one answer."""
        [piece] = pieces
        answer: dict[str, Any] = {"generated_text": self._prefix + piece.text}
        if self._with_details:
            tokens = self._tokens(piece.token_ids, piece)
            details = self._ending(piece.finish_reason, piece.stop_reason, len(tokens))
            answer["details"] = details | {"prefill": [], "tokens": tokens}
        return answer

    def frames(self, batch: Batch) -> bytes:
        """An event for each token; the text that came with several goes with the last of them."""
        return b"".join(self._events(delta) for _, delta in batch)

    def _events(self, delta: TextDelta) -> bytes:
        self._text.append(delta.text)
        tokens = self._tokens(delta.token_ids, Piece.joined([delta]))
        if not tokens and delta.text:  # held back until now: no token of its own
            tokens = [{"id": 0, "text": "", "logprob": None, "special": True}]
        if tokens:
            tokens[-1]["text"] = delta.text
        events = []
        for token in tokens:
            self._num_tokens += 1
            events.append({"index": self._num_tokens, "token": token, "generated_text": None})
            events[-1]["details"] = None
        if delta.finish_reason is not None and events:
            events[-1]["generated_text"] = self._prefix + "".join(self._text)
            if self._with_details:
                ending = self._ending(delta.finish_reason, delta.stop_reason, self._num_tokens)
                num_input = len(self.options.prompts[0].token_ids)
                events[-1]["details"] = ending | {"input_length": num_input}
        return b"".join(map(sse, events))

    def _tokens(self, token_ids: Sequence[int], piece: Piece) -> list[dict[str, Any]]:
        logprobs: Sequence[float | None] = [entry.logprob for entry in piece.logprobs]
        if not logprobs:
            logprobs = [None] * len(token_ids)
        return [
            {
                "id": token_id,
                "text": self.logprobs.text_of(token_id),
                "logprob": logprob,
                "special": self.logprobs.is_special(token_id),
            }
            for token_id, logprob in zip(token_ids, logprobs, strict=True)
        ]

    def _ending(
        self, reason: FinishReason | None, stopped_by: str | int | None, num_tokens: int
    ) -> dict[str, Any]:
        name = "length"
        if reason is FinishReason.STOP:
            name = "eos_token" if stopped_by is None else "stop_sequence"
        return {"finish_reason": name, "generated_tokens": num_tokens, "seed": self._seed}
