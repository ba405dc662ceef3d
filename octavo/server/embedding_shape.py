"""The shape of /v1/embeddings: a list of vectors, as numbers or as base64. Knows no engine."""

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal

from octavo.server.answers import Batch, Tally
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import Piece, Shape, ShapeOptions

EncodingFormat = Literal["float", "base64"]


class EmbeddingShape(Shape):
    """A response of object `list`, whose data are of object `embedding`. It does not stream."""

    id_prefix = "embd-"

    def __init__(self, options: ShapeOptions, logprobs: LogprobShaper, *, encoding: EncodingFormat):
        super().__init__(options, logprobs)
        self._encode = _base64 if encoding == "base64" else _numbers

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response."""
        num_tokens = sum(tally.num_prompt_tokens for tally in tallies)
        num_cached = sum(tally.num_cached_tokens for tally in tallies)
        return {
            "id": self.id,
            "object": "list",
            "created": self._created,
            "model": self.options.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": self._encode(piece.vector)}
                for index, piece in enumerate(pieces)
            ],
            "usage": {
                "prompt_tokens": num_tokens,
                "total_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": num_cached},
            },
        }

    def frames(self, batch: Batch) -> bytes:
        """None: a vector comes whole."""
        return b""


def _numbers(vector: bytes) -> list[float]:
    return array("f", vector).tolist()


def _base64(vector: bytes) -> str:
    """As OpenAI: float32, little-endian."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(numbers.tobytes()).decode()
