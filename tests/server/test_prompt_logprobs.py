"""Log-probabilities of the prompt over HTTP: vLLM's field, OpenAI's echo, lm-eval's call."""

import json
from typing import Any

import httpx
import pytest
from server.helpers import client_of

from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine

URL = "/v1/completions"
HI = {"prompt": [72, 105, 33]}  # "Hi!"
# What the fake engine says of every token: -0.25, the likeliest, and the next byte after it.
LISTS = {
    "tokens": ["H", "i", "!"],
    "token_logprobs": [None, -0.25, -0.25],
    "top_logprobs": [None, {"i": -0.25}, {"!": -0.25}],
    "text_offset": [0, 1, 2],
}
ANSWER_LISTS = {
    "tokens": ["A", "n"],
    "token_logprobs": [-0.25, -0.25],
    "top_logprobs": [{"A": -0.25}, {"n": -0.25}],
    "text_offset": [3, 4],
}


async def post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def entry(text: str, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


async def test_vllms_field_of_completions(client: httpx.AsyncClient) -> None:
    body = HI | {"prompt_logprobs": 2, "n": 2, "max_tokens": 2}
    document = await post(client, URL, body)
    expected = [
        None,
        {"105": entry("i", -0.25, 1), "106": entry("j", -1.25, 2)},
        {"33": entry("!", -0.25, 1), "34": entry('"', -1.25, 2)},
    ]
    assert [choice["prompt_logprobs"] for choice in document["choices"]] == [expected] * 2
    assert [choice["logprobs"] for choice in document["choices"]] == [None] * 2
    assert document["usage"]["completion_tokens"] == 4


async def test_vllms_field_of_chat(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "H"}], "prompt_logprobs": 0, "max_tokens": 1}
    document = await post(client, "/v1/chat/completions", body)
    first, *others = document["prompt_logprobs"]
    assert first is None
    assert len(others) == document["usage"]["prompt_tokens"] - 1
    assert all(len(of_token) == 1 for of_token in others)
    assert "prompt_logprobs" not in document["choices"][0]


async def test_who_does_not_ask_is_not_told(client: httpx.AsyncClient) -> None:
    document = await post(client, URL, HI | {"echo": True, "logprobs": 1, "max_tokens": 2})
    assert "prompt_logprobs" not in document["choices"][0]
    assert "prompt_logprobs" not in (await post(client, URL, HI))["choices"][0]


@pytest.mark.parametrize("further", [{}, {"prompt_logprobs": 5}], ids=str)
async def test_echo_with_logprobs(client: httpx.AsyncClient, further: dict[str, Any]) -> None:
    body = HI | {"echo": True, "logprobs": 0, "max_tokens": 2, "n": 2} | further
    document = await post(client, URL, body)
    for choice in document["choices"]:
        assert choice["text"] == "Hi!An"
        assert choice["logprobs"] == {name: LISTS[name] + ANSWER_LISTS[name] for name in LISTS}


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_with_logprobs_streams(client: httpx.AsyncClient, max_tokens: int) -> None:
    body = HI | {"echo": True, "logprobs": 0, "max_tokens": max_tokens, "n": 2}
    expected = await post(client, URL, body)
    response = await client.post(URL, json=body | {"stream": True})
    frames = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert frames.pop() == "[DONE]"
    texts = ["", ""]
    joined: list[dict[str, list[Any]]] = [{name: [] for name in LISTS} for _ in texts]
    reasons = []
    for frame in frames:
        for choice in json.loads(frame)["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            for name, values in (choice["logprobs"] or {}).items():
                joined[choice["index"]][name] += values
    assert texts == [choice["text"] for choice in expected["choices"]]
    assert joined == [choice["logprobs"] for choice in expected["choices"]]
    assert reasons == ["length"] * 2


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_the_call_of_lm_eval(
    client: httpx.AsyncClient, engine: FakeEngine, max_tokens: int
) -> None:
    body = {
        "model": "fake-model",
        "prompt": [[72, 105, 33], [72]],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    document = await post(client, URL, body)
    first, second = document["choices"]
    # As lm-eval reads it: the continuation's tokens, and whether each was the likeliest.
    assert first["logprobs"]["token_logprobs"][:3] == LISTS["token_logprobs"]
    assert len(first["logprobs"]["tokens"]) == 3 + max_tokens
    assert max(first["logprobs"]["top_logprobs"][1].values()) == -0.25
    assert second["logprobs"]["token_logprobs"][0] is None
    assert document["usage"]["completion_tokens"] == 2 * max_tokens
    assert [sampling.prompt_logprobs for _, sampling in engine.received.values()] == [1, 1]


async def test_what_nobody_could_see_is_not_computed(client: httpx.AsyncClient) -> None:
    echoed = await post(client, URL, HI | {"echo": True, "max_tokens": 0})
    assert echoed["choices"][0]["text"] == "Hi!"
    scored = await post(client, URL, HI | {"prompt_logprobs": 0, "max_tokens": 0})
    assert scored["choices"][0]["finish_reason"] == "length"
    response = await client.post(URL, json=HI | {"max_tokens": 0, "logprobs": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_a_scored_prompt_may_fill_the_context() -> None:
    engine = FakeEngine(max_model_len=8)
    async with client_of(engine, ServerConfig()) as client:
        body = {"echo": True, "logprobs": 0, "max_tokens": 0}
        full = await post(client, URL, body | {"prompt": [72] * 8})
        assert len(full["choices"][0]["logprobs"]["tokens"]) == 8
        response = await client.post(URL, json=body | {"prompt": [72] * 9})
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "at least one new token" not in response.text


async def test_metrics_count_a_request_without_tokens(client: httpx.AsyncClient) -> None:
    await post(client, URL, HI | {"echo": True, "logprobs": 0, "max_tokens": 0})
    metrics = (await client.get("/metrics")).text
    assert 'octavo_request_success_total{finished_reason="length"} 1.0' in metrics
    assert "octavo_request_prefill_time_seconds_count 1.0" in metrics
    assert "octavo_time_to_first_token_seconds_count 0.0" in metrics
