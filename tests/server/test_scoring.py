"""/score and /rerank: shapes of vLLM, Jina and Cohere, with a cross-encoder and without."""

from math import sqrt

import httpx
import pytest
from server.helpers import client_of
from server.test_embeddings import vector_of

from octavo.core import ModelTasks, PoolingParams
from octavo.testing.byte_tokenizer import BOS, EOS
from octavo.testing.fake_engine import FakeEngine

CROSS_ENCODER = ModelTasks(
    generates=False,
    embedding=PoolingParams(pooling="cls"),
    num_classes=1,
    num_token_types=2,
)
DOCUMENTS = ["an elephant", "a mouse", "some of the whales"]


@pytest.fixture
async def cross_encoder():
    async with client_of(FakeEngine(tasks=CROSS_ENCODER)) as client:
        yield client


def pair_length(query: str, document: str) -> int:
    return len(query) + len(document) + 2


def cosine(first: str, second: str) -> float:
    a, b = (vector_of([BOS, *text.encode()]) for text in (first, second))
    return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
async def test_a_cross_encoder_reads_each_pair_at_once(
    cross_encoder: httpx.AsyncClient, path: str, names: tuple[str, str]
) -> None:
    body = dict(zip(names, ("large", DOCUMENTS), strict=True))
    answer = await cross_encoder.post(path, json=body)
    assert answer.status_code == 200, answer.text
    lengths = [pair_length("large", document) for document in DOCUMENTS]
    told = answer.json()
    assert told["object"] == "list"
    assert told["data"] == [
        {"index": i, "object": "score", "score": n} for i, n in enumerate(lengths)
    ]
    assert told["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


async def test_other_models_score_by_the_cosine_of_their_vectors(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"text_1": ["large", "small"], "text_2": ["an elephant", "large"]}
    answer = await client.post("/score", json=body)
    scores = [one["score"] for one in answer.json()["data"]]
    expected = [cosine("large", "an elephant"), cosine("small", "large")]
    assert scores == pytest.approx(expected)
    assert len(engine.received) == 3  # a text that occurs twice is embedded once


@pytest.mark.parametrize(
    ("path", "shows"), [("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)]
)
async def test_documents_come_sorted(
    cross_encoder: httpx.AsyncClient, path: str, shows: bool
) -> None:
    body = {"model": "fake-model", "query": "large", "documents": DOCUMENTS, "top_n": 2}
    told = (await cross_encoder.post(path, json=body)).json()
    expected = [
        {"index": i, "relevance_score": pair_length("large", DOCUMENTS[i])}
        | ({"document": {"text": DOCUMENTS[i]}} if shows else {})
        for i in (2, 0)
    ]
    assert told["results"] == expected
    body["documents"] = [{"text": text} for text in DOCUMENTS]
    body |= {"return_documents": not shows, "top_n": 3}
    told = (await cross_encoder.post(path, json=body)).json()
    assert [one["index"] for one in told["results"]] == [2, 0, 1]
    assert all(("document" in one) is not shows for one in told["results"])


async def test_the_types_of_tokens_go_with_their_ids_and_the_longer_text_is_cut() -> None:
    engine = FakeEngine(tasks=CROSS_ENCODER)
    async with client_of(engine) as client:
        body = {"text_1": "ab", "text_2": "wxyz", "truncate_prompt_tokens": 6}
        assert (await client.post("/score", json=body)).status_code == 200
    [(token_ids, _)] = engine.received.values()
    size = engine.model.vocab_size
    assert token_ids == [*b"ab", EOS, *(size + i for i in b"wx"), size + EOS]


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": "a", "queries": "a", "text_2": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "2 queries and 3 documents"),
        ("/score", {"text_1": "a", "text_2": []}, "nothing to score"),
        ("/rerank", {"query": "a", "documents": []}, "nothing to score"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 5}, "not supported"),
        ("/rerank", {"query": "a", "documents": ["b"], "model": "other"}, "does not exist"),
        ("/rerank", {"query": "a" * 70_000, "documents": ["b"]}, "context"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 1025}, "at most 1024"),
    ],
)
async def test_what_is_refused(
    cross_encoder: httpx.AsyncClient, path: str, body: dict[str, object], word: str
) -> None:
    answer = await cross_encoder.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert word in answer.json()["error"]["message"]


async def test_an_encoder_does_what_it_was_made_for_and_nothing_else(
    cross_encoder: httpx.AsyncClient,
) -> None:
    answers = [
        await cross_encoder.post("/v1/completions", json={"prompt": "Hi"}),
        await cross_encoder.post("/v1/embeddings", json={"input": "Hi"}),
    ]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert all("/score" in answer.json()["error"]["message"] for answer in answers)


async def test_several_classes_are_no_score() -> None:
    tasks = ModelTasks(generates=False, num_classes=3)
    async with client_of(FakeEngine(tasks=tasks)) as client:
        answer = await client.post("/score", json={"text_1": "a", "text_2": "b"})
    assert answer.status_code == 400
    assert "3 classes" in answer.json()["error"]["message"]
