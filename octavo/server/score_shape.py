"""The shapes of /score and /rerank: how well texts fit each other. Knows no engine."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from octavo.engine.scoring import cosine, score_of
from octavo.server.answers import Batch, Tally
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import Piece, Shape, ShapeOptions


class PairShape(Shape):
    """A response about pairs of texts. It does not stream.

    pairs: the places of each pair's vectors among the pieces; None where each piece is the score of
        a pair already.
    """

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        pairs: Sequence[tuple[int, int]] | None,
    ):
        super().__init__(options, logprobs)
        self._pairs = pairs

    def response(self, pieces: Sequence[Piece], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The whole response."""
        if self._pairs is None:
            scores = [score_of(piece.vector) for piece in pieces]
        else:
            scores = [cosine(pieces[a].vector, pieces[b].vector) for a, b in self._pairs]
        num_tokens = sum(tally.num_prompt_tokens for tally in tallies)
        return {"id": self.id, "model": self.options.model} | self.body(scores, num_tokens)

    def frames(self, batch: Batch) -> bytes:
        """None: a score comes whole."""
        return b""

    @abstractmethod
    def body(self, scores: Sequence[float], num_tokens: int) -> dict[str, Any]:
        """What is said of the scores, which are in the order of the pairs."""


class ScoreShape(PairShape):
    """vLLM's: an object `list` of scores in the order of the pairs."""

    id_prefix = "score-"

    def body(self, scores: Sequence[float], num_tokens: int) -> dict[str, Any]:
        return {
            "object": "list",
            "created": self._created,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }


class RerankShape(PairShape):
    """Jina's and Cohere's: the best documents first."""

    id_prefix = "rerank-"

    def __init__(
        self,
        options: ShapeOptions,
        logprobs: LogprobShaper,
        *,
        pairs: Sequence[tuple[int, int]] | None,
        top_n: int,
        documents: Sequence[str] | None,
    ):
        """`documents`: shown beside their scores; None: they are not."""
        super().__init__(options, logprobs, pairs=pairs)
        self._top_n = top_n
        self._documents = documents

    def body(self, scores: Sequence[float], num_tokens: int) -> dict[str, Any]:
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._top_n]
        results: list[dict[str, Any]] = []
        for index in best:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if self._documents is not None:
                result["document"] = {"text": self._documents[index]}
            results.append(result)
        return {
            "results": results,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
