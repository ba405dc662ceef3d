"""The shapes of KServe's inference protocol 2 with Triton's generate extension.

Knows no engine and no sockets.
"""

from collections.abc import Sequence
from typing import Any

from octavo.engine import TextDelta
from octavo.server.answers import Batch, Tally
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import Piece, Shape, ShapeOptions, sse

MODEL_VERSION = "1"
TEXT_OUTPUT = "text_output"


class KServeShape(Shape):
    """`text_output`: behind the prompt, unless `exclude_input_in_output` was asked for.

    as_tensors: the answers as one tensor of bytes, the output of `/infer`.
    """

    id_prefix = "infer-"

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        request_id: str | None = None,
        exclude_input: bool = False,
        as_tensors: bool = False,
    ):
        super().__init__(options, logprobs)
        self._request_id = request_id
        self._exclude_input = exclude_input
        self._as_tensors = as_tensors

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response, without streaming."""
        texts = [self._text(index, piece) for index, piece in enumerate(pieces)]
        if not self._as_tensors:
            return self._head() | {TEXT_OUTPUT: texts[0]}
        tensor = {"name": TEXT_OUTPUT, "datatype": "BYTES", "shape": [len(texts)], "data": texts}
        return self._head() | {"outputs": [tensor]}

    def _text(self, index: int, piece: Piece) -> str:
        prompt = "" if self._exclude_input else self.prompt_of(index).text or ""
        return prompt + piece.text

    def frames(self, batch: Batch) -> bytes:
        """An event for each piece of text."""
        return b"".join(self._event(delta) for _, delta in batch if delta.text)

    def _event(self, delta: TextDelta) -> bytes:
        return sse(self._head() | {TEXT_OUTPUT: delta.text})

    def _head(self) -> dict[str, Any]:
        head = {"model_name": self.options.model, "model_version": MODEL_VERSION}
        return head if self._request_id is None else head | {"id": self._request_id}
