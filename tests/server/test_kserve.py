"""KServe's protocol 2 with Triton's generate extension and the names of its vLLM backend."""

import json
from typing import Any

import httpx
import pytest

from octavo.testing.fake_engine import FakeEngine

MODEL = "/v2/models/fake-model"


def tensor(name: str, *data: Any, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": list(data)}


async def completion(client: httpx.AsyncClient, prompt: str, **more: Any) -> str:
    answer = await client.post("/v1/completions", json={"prompt": prompt} | more)
    text: str = answer.json()["choices"][0]["text"]
    return text


async def test_health_and_metadata(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"):
        response = await client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    assert (await client.get("/v2")).json()["name"] == "octavo"
    model = (await client.get(MODEL)).json()
    assert model["name"] == "fake-model" and model["versions"] == ["1"]
    assert {entry["name"] for entry in model["outputs"]} == {"text_output"}
    engine.script.dead = True
    for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"):
        assert (await client.get(path)).status_code == 503
    engine.script.dead = False
    assert (await client.get("/v2/models/other/ready")).status_code == 404


async def test_generate(client: httpx.AsyncClient) -> None:
    body = {"text_input": "Hello", "id": "7", "parameters": {"max_tokens": 5, "temperature": 0}}
    answer = (await client.post(f"{MODEL}/generate", json=body)).json()
    text = await completion(client, "Hello", max_tokens=5)
    assert answer == {
        "model_name": "fake-model",
        "model_version": "1",
        "id": "7",
        "text_output": "Hello" + text,
    }
    body["parameters"]["exclude_input_in_output"] = True
    assert (await client.post(f"{MODEL}/generate", json=body)).json()["text_output"] == text


async def test_generate_stream(client: httpx.AsyncClient) -> None:
    body = {"text_input": "Hello", "parameters": {"max_tokens": 9, "stream": True}}
    response = await client.post(f"{MODEL}/generate_stream", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[5:]) for line in response.text.splitlines() if line]
    assert len(events) == 9 and all(event["model_name"] == "fake-model" for event in events)
    text = "".join(event["text_output"] for event in events)
    assert text == await completion(client, "Hello", max_tokens=9)


async def test_infer(client: httpx.AsyncClient) -> None:
    inputs = [
        tensor("text_input", "One", "Two"),
        tensor("sampling_parameters", json.dumps({"max_tokens": 4, "logit_bias": {"1": 2.5}})),
        tensor("exclude_input_in_output", True, datatype="BOOL"),
    ]
    response = await client.post(f"{MODEL}/infer", json={"id": "x", "inputs": inputs})
    expected = [await completion(client, prompt, max_tokens=4) for prompt in ("One", "Two")]
    assert response.json() == {
        "model_name": "fake-model",
        "model_version": "1",
        "id": "x",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": expected}],
    }


PROMPT = tensor("text_input", "a")
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {}, "text_input"),
    ("generate", {"text_input": 3}, "text_input"),
    ("generate", {"text_input": "a", "parameters": {"max_tokens": "5"}}, "max_tokens"),
    ("generate", {"text_input": "a", "parameters": {"max_tokens": 0}}, "max_tokens"),
    ("generate", {"text_input": "a", "parameters": {"temperatur": 1}}, "temperatur"),
    ("generate_stream", {"text_input": "a", "parameters": {"top_p": 7}}, "top_p"),
    ("generate", {"text_input": "a", "parameters": {"n": 2}}, "n"),
    ("infer", {"inputs": []}, "inputs"),
    ("infer", {"inputs": [tensor("image", "a"), PROMPT]}, "inputs"),
    ("infer", {"inputs": [tensor("text_input", 3)]}, "text_input"),
    ("infer", {"inputs": [PROMPT | {"shape": [2]}]}, "text_input"),
    ("infer", {"inputs": [PROMPT | {"shape": [-1, -1]}]}, "text_input"),
    ("infer", {"inputs": [PROMPT, tensor("sampling_parameters", "{")]}, "sampling_parameters"),
    ("infer", {"inputs": [PROMPT, tensor("stream", True, datatype="BOOL")]}, "inputs"),
    (
        "infer",
        {"inputs": [PROMPT, tensor("exclude_input_in_output", 1, 2)]},
        "exclude_input_in_output",
    ),
]


@pytest.mark.parametrize(("route", "body", "param"), WRONG)
async def test_wrong_requests(
    client: httpx.AsyncClient, route: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(f"{MODEL}/{route}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_an_unknown_model(client: httpx.AsyncClient) -> None:
    response = await client.post("/v2/models/other/generate", json={"text_input": "a"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
