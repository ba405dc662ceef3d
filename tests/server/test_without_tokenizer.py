"""A server without a tokenizer: a chunk for each token, and refusals of all that needs text."""

import json

import httpx
import pytest
from server.helpers import client_of

from octavo.core import FinishReason
from octavo.engine import ServedModel, TextDelta
from octavo.server.openai_completions import CompletionShape
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.response_shape import ShapeOptions
from octavo.testing.fake_engine import FakeEngine
from octavo.text import NoTokenizer


def shape(**options):
    common = {"model": "m", "prompts": [], "num_per_prompt": 1, "with_logprobs": False}
    common |= {"return_token_ids": False, "include_usage": False}
    return CompletionShape(ShapeOptions(**common | options), LogprobShaper(NoTokenizer()))


def choices(frames):
    return [json.loads(f.removeprefix(b"data: "))["choices"][0] for f in frames.split(b"\n\n")[:-1]]


def test_each_token_is_a_chunk_though_its_text_is_empty():
    batch = [
        (0, TextDelta(0, "", (5,))),
        (0, TextDelta(0, "", (6,))),
        (0, TextDelta(0, "", (7,), finish_reason=FinishReason.LENGTH)),
    ]
    found = choices(shape(has_text=False).frames(batch))
    assert [choice["text"] for choice in found] == [""] * 4
    assert [choice["finish_reason"] for choice in found] == [None, None, None, "length"]
    # With a tokenizer, ids whose text is still to come have no chunk.
    assert len(choices(shape().frames(batch))) == 1


@pytest.fixture
async def client():
    engine = FakeEngine()
    engine.model = ServedModel("fake-model", 4096, 300, NoTokenizer())
    async with client_of(engine) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "text"}, "prompt"),
        ("/v1/completions", {"prompt": [1], "logprobs": 1}, "logprobs"),
        ("/v1/completions", {"prompt": [1], "echo": True}, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "text"}, "prompt"),
        ("/detokenize", {"tokens": [1]}, None),
    ],
)
async def test_what_needs_text_is_a_bad_request(client: httpx.AsyncClient, path, body, param):
    response = await client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "tokenizer" in error["message"] and error["param"] == param
