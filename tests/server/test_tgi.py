"""Text Generation Inference's surface, asked by its own client and in its own words."""

import json
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from server.helpers import LiveServer

from octavo.testing.fake_engine import FakeEngine


def hub_client(server: LiveServer) -> InferenceClient:
    return InferenceClient(server.url, token="unused")


def reference(server: LiveServer, prompt: str, **more: Any) -> str:
    """The same prompt over the OpenAI surface."""
    body = {"prompt": prompt, "temperature": 0} | more
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    text: str = answer["choices"][0]["text"]
    return text


def test_the_hub_client_generates(server: LiveServer) -> None:
    text = hub_client(server).text_generation("Hello", max_new_tokens=7)
    assert text == reference(server, "Hello", max_tokens=7)


def test_the_hub_client_asks_for_details(server: LiveServer) -> None:
    answer = hub_client(server).text_generation("Hello", max_new_tokens=5, details=True, seed=3)
    assert answer.details.finish_reason == "length" and answer.details.generated_tokens == 5
    assert answer.details.seed == 3 and len(answer.details.tokens) == 5
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
    assert all(token.logprob <= 0 for token in answer.details.tokens)


def test_the_hub_client_streams(server: LiveServer) -> None:
    client = hub_client(server)
    pieces = list(client.text_generation("Hello", max_new_tokens=9, stream=True))
    assert len(pieces) == 9 and "".join(pieces) == reference(server, "Hello", max_tokens=9)
    events = list(client.text_generation("Hello", max_new_tokens=9, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 10))
    assert events[-1].generated_text == "".join(pieces)
    assert events[-1].details.finish_reason == "length"
    assert events[-1].details.generated_tokens == 9
    assert all(event.details is None for event in events[:-1])


def test_stop_sequences_and_full_text(server: LiveServer) -> None:
    client = hub_client(server)
    whole = client.text_generation("Hello", max_new_tokens=30)
    stop = whole[6:8]
    answer = client.text_generation("Hello", max_new_tokens=30, stop=[stop], details=True)
    assert answer.generated_text == whole[: whole.index(stop)]
    assert answer.details.finish_reason == "stop_sequence"
    full = client.text_generation("Hello", max_new_tokens=3, return_full_text=True)
    assert full == "Hello" + whole[:3]


def test_the_hub_client_chats_on_the_openai_surface(server: LiveServer) -> None:
    message = {"role": "user", "content": "Hi"}
    answer = hub_client(server).chat_completion([message], model="fake-model", max_tokens=5)
    assert answer.usage.completion_tokens == 5 and answer.choices[0].message.content


async def test_the_routes_behind_the_client(client: httpx.AsyncClient) -> None:
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 3}}
    whole = (await client.post("/generate", json=body)).json()
    assert set(whole) == {"generated_text"}
    assert (await client.post("/", json=body)).json() == whole
    streamed = await client.post("/generate_stream", json=body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[5:]) for line in streamed.text.splitlines() if line]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert (await client.post("/", json=body | {"stream": True})).text == streamed.text
    long = (await client.post("/generate", json={"inputs": "Hi" * 200})).json()
    assert len(long["generated_text"]) == 100, "TGI's default"
    info = (await client.get("/info")).json()
    assert info["model_id"] == "fake-model" and info["max_total_tokens"] > info["max_input_tokens"]


async def test_draws_and_greedy(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for parameters, temperature in (
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_p": 0.9}, 1.0),
        ({"seed": 1}, 1.0),
    ):
        await client.post("/generate", json={"inputs": "a", "parameters": parameters})
        _, sampling = list(engine.received.values())[-1]
        assert sampling.temperature == temperature, parameters


WRONG = [
    ({}, "inputs"),
    ({"inputs": 3}, "inputs"),
    ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
    ({"inputs": "a", "parameters": {"temperature": -1}}, "parameters.temperature"),
    ({"inputs": "a", "parameters": {"top_p": 7}}, "parameters.top_p"),
    ({"inputs": "a" * 100_000}, "inputs"),
    ({"inputs": "a", "parameters": {"watermark": True}}, "parameters.watermark"),
    ({"inputs": "a", "parameters": {"best_of": 4}}, "parameters.best_of"),
    ({"inputs": "a", "parameters": {"grammar": {"type": "json"}}}, "parameters.grammar"),
    ({"inputs": "a", "parameters": {"top_n_tokens": 3}}, "parameters.top_n_tokens"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
async def test_wrong_requests(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_hub_client_hears_of_errors(server: LiveServer) -> None:
    with pytest.raises(HfHubHTTPError, match="context_length_exceeded"):
        hub_client(server).text_generation("Hello", max_new_tokens=10**6)
