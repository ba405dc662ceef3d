"""How well texts fit each other: which are held against which, and the cosine of two vectors.

Pure Python, for both ways to the engine. Knows no models and no HTTP.
"""

from array import array
from collections.abc import Sequence
from math import sqrt

from octavo.errors import RequestError


def matched(queries: Sequence[str], documents: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The pairs to be scored: one query with every document, or each with its own.

    Raises:
        RequestError: there are none, or several of both and not as many.
    """
    if not queries or not documents:
        raise RequestError("there is nothing to score: give a query and a document", param="query")
    if len(queries) == 1:
        return tuple((queries[0], document) for document in documents)
    if len(queries) != len(documents):
        raise RequestError(
            f"{len(queries)} queries and {len(documents)} documents: give one query, or as many as "
            "there are documents",
            param="documents",
        )
    return tuple(zip(queries, documents, strict=True))


def cosine(first: bytes, second: bytes) -> float:
    """The cosine of the angle between two vectors, each the bytes of float32; 0 without a length.

    Raises:
        ValueError: they are of different lengths.
    """
    a, b = array("f", first), array("f", second)
    product = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return product / lengths if lengths else 0.0


def score_of(vector: bytes) -> float:
    """The one number that a cross-encoder makes of a pair."""
    return float(array("f", vector)[0])
