"""Responses have OpenAI's shapes, field by field, with and without streaming."""

import json
from typing import Any

import httpx
import pytest

from octavo.testing.fake_engine import FakeEngine

HELLO = {"prompt": "Hello"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a stream; checks its frame."""
    response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_completion(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=HELLO | {"model": "fake-model"})
    document = response.json()
    assert document.pop("id").startswith("cmpl-")
    assert isinstance(document.pop("created"), int)
    assert document == {
        "object": "text_completion",
        "model": "fake-model",
        "choices": [
            {"index": 0, "text": "Answer 0 to: Hel", "logprobs": None, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 16,
            "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_chat(client: httpx.AsyncClient) -> None:
    document = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert document.pop("id").startswith("chatcmpl-")
    assert isinstance(document.pop("created"), int)
    text = "Answer 0 to: user: Hello\nassistant: "
    assert document == {
        "object": "chat.completion",
        "model": "fake-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 24,
            "completion_tokens": 37,
            "total_tokens": 61,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    body = HELLO | {"max_tokens": 2, "stream_options": {"include_usage": True}}
    chunks = await events(client, "/v1/completions", body)
    assert len({chunk.pop("id") for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.pop("object") == "text_completion"
        assert chunk.pop("model") == "fake-model"
        assert isinstance(chunk.pop("created"), int)

    def piece(text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    assert chunks == [
        {"choices": [piece("A")], "usage": None},
        {"choices": [piece("n")], "usage": None},
        {"choices": [piece("", "length")], "usage": None},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 6,
                "completion_tokens": 2,
                "total_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        },
    ]


async def test_chat_stream(client: httpx.AsyncClient) -> None:
    chunks = await events(client, "/v1/chat/completions", CHAT | {"max_completion_tokens": 2})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "A"},
        {"content": "n"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]


TEXTS = ["plain", "naïve façade – 漢字 🙂 e\u0301", 'quotes " \\ and \x00 \u2028', ""]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"return_token_ids": True}])
async def test_deltas_add_up_to_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, text: str, extra: dict[str, Any]
) -> None:
    engine.script.reply = lambda prompt, index: text * (index + 1)
    if path == "/v1/completions":
        body = HELLO | {"n": 3, "max_tokens": 200} | extra
        body |= {"logprobs": 1} if "logprobs" in extra else {}
    else:
        body = CHAT | {"n": 3} | extra
    whole = (await client.post(path, json=body)).json()["choices"]
    texts, ids = [""] * 3, [[], [], []]
    for chunk in await events(client, path, body):
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] += piece
            ids[choice["index"]] += choice.get("token_ids", [])
    expected = [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in whole
    ]
    assert texts == expected == [text * n for n in (1, 2, 3)]
    assert ids == [choice.get("token_ids", []) for choice in whole]


async def test_several_prompts(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 50}
    document = (await client.post("/v1/completions", json=body)).json()
    texts = [choice["text"] for choice in document["choices"]]
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
    assert texts == [f"Answer {i} to: {prompt}" for prompt in ("one", "two") for i in (0, 1)]
    assert document["usage"]["prompt_tokens"] == 8
    streamed = [""] * 4
    for chunk in await events(client, "/v1/completions", body):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]], "Hi", ["Hi"]])
async def test_forms_of_a_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any
) -> None:
    body = {"prompt": prompt, "max_tokens": 50, "add_special_tokens": False}
    document = (await client.post("/v1/completions", json=body)).json()
    assert document["choices"][0]["text"] == "Answer 0 to: Hi"
    [(token_ids, _)] = engine.received.values()
    assert token_ids == [72, 105]


@pytest.mark.parametrize("prompt", ["Hi é", [72, 105, 257]])
async def test_echo(client: httpx.AsyncClient, prompt: Any) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 6}
    document = (await client.post("/v1/completions", json=body)).json()
    text = ("Hi é" if isinstance(prompt, str) else "Hi") + "Answer"
    assert document["choices"][0]["text"] == text
    chunks = await events(client, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    body = HELLO | {"logprobs": 2, "max_tokens": 3}
    document = (await client.post("/v1/completions", json=body)).json()
    expected = {
        "tokens": ["A", "n", "s"],
        "token_logprobs": [-0.25, -0.25, -0.25],
        "top_logprobs": [
            {"A": -0.25, "B": -1.25},
            {"n": -0.25, "o": -1.25},
            {"s": -0.25, "t": -1.25},
        ],
        "text_offset": [0, 1, 2],
    }
    assert document["choices"][0]["logprobs"] == expected
    joined: dict[str, list[Any]] = {name: [] for name in expected}
    for chunk in await events(client, "/v1/completions", body):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == expected


async def test_chat_logprobs(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.reply = lambda prompt, index: "é"
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    document = (await client.post("/v1/chat/completions", json=body)).json()
    first, second, eos = document["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "bytes:\\xc3",
        "logprob": -0.25,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "bytes:\\xc3", "logprob": -0.25, "bytes": [0xC3]}],
    }
    assert second["bytes"] == [0xA9]
    assert (eos["token"], eos["bytes"]) == ("<|eos|>", None)
    streamed = [
        entry
        for chunk in await events(client, "/v1/chat/completions", body)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == [first, second, eos]


async def test_token_ids(client: httpx.AsyncClient) -> None:
    body = HELLO | {"return_token_ids": True, "max_tokens": 2}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["prompt_token_ids"] == [256, *b"Hello"]
    assert choice["token_ids"] == [*b"An"]
    chunks = await events(client, "/v1/completions", body)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [256, *b"Hello"]
    body = CHAT | {"return_token_ids": True, "max_tokens": 2}
    document = (await client.post("/v1/chat/completions", json=body)).json()
    assert document["prompt_token_ids"][:5] == [256, *b"user"]
    assert document["choices"][0]["token_ids"] == [*b"An"]
    chunks = await events(client, "/v1/chat/completions", body)
    assert chunks[0]["prompt_token_ids"] == document["prompt_token_ids"]


async def test_stop_strings(client: httpx.AsyncClient) -> None:
    for stop in ("to:", ["zzz", "to:"]):
        body = HELLO | {"stop": stop, "max_tokens": 100}
        [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("Answer 0 ", "stop")
        assert choice["stop_reason"] == "to:"


async def test_every_sampling_field_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": -5,
        "stop": ["x"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 3,
        "logprobs": 4,
        "allowed_token_ids": [3, 4],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    body = HELLO | fields | {"logit_bias": {"5": -100, "6": 1.5}}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    [(_, sampling)] = engine.received.values()
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}


async def test_null_means_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    names = ["model", "n", "temperature", "top_p", "seed", "stop", "max_tokens", "logit_bias"]
    names += ["logprobs", "stream", "stream_options", "suffix", "tools", "response_format"]
    body = HELLO | dict.fromkeys(names)
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    [(_, sampling)] = engine.received.values()
    assert (sampling.max_tokens, sampling.temperature, sampling.n) == (16, 1.0, 1)


async def test_chat_messages(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "ok", "refusal": None},
        {"role": "user", "content": "<|eos|>", "name": "Ann"},
    ]
    body = {"messages": messages, "add_generation_prompt": False}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    [(token_ids, sampling)] = engine.received.values()
    text = "system: Be brief.\nuser: a\nb\nassistant: ok\nuser: <|eos|>\n"
    assert bytes(token_ids[1:]).decode() == text
    assert sampling.max_tokens is None


async def test_neutral_values_of_unsupported_fields_pass(client: httpx.AsyncClient) -> None:
    neutral = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "modalities": ["text"],
        "user": "ann",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
    }
    response = await client.post("/v1/chat/completions", json=CHAT | neutral)
    assert response.status_code == 200


async def test_unknown_fields_are_logged_once(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        response = await client.post("/v1/completions", json=HELLO | {"nonesuch_a": 1})
        assert response.status_code == 200
    assert [r.getMessage() for r in caplog.records] == [
        "request field 'nonesuch_a' is unknown here and ignored"
    ]


async def test_models(client: httpx.AsyncClient) -> None:
    document = (await client.get("/v1/models")).json()
    assert document["object"] == "list"
    [card] = document["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake-model", "model", 4096)
    assert (await client.get("/v1/models/fake-model")).json() == card


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    body = {"prompt": "é", "return_token_strs": True}
    document = (await client.post("/tokenize", json=body)).json()
    assert document == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [256, 195, 169],
        "token_strs": ["<|bos|>", "\ufffd", "\ufffd"],
    }
    document = (await client.post("/tokenize", json=CHAT)).json()
    assert document["tokens"] == [256, *b"user: Hello\nassistant: "]
    response = await client.post("/detokenize", json={"tokens": [195, 169, 257]})
    assert response.json() == {"prompt": "é<|eos|>"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_small_pages(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    ready = (await client.get("/ready")).json()
    assert ready == {"status": "ready", "state": "ok", "why": ""}
    assert isinstance((await client.get("/version")).json()["version"], str)
    as_json = {"accept": "application/json"}
    assert (await client.get("/", headers=as_json)).json()["models"] == ["fake-model"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.2_3:4", True), ("a b", False), ("x" * 65, False), ("a\u00e9", False), ("", False)],
)
async def test_request_ids(client: httpx.AsyncClient, sent: str, kept: bool) -> None:
    headers = {"x-request-id": sent.encode("latin-1")}
    response = await client.get("/health", headers=headers)
    returned = response.headers["x-request-id"]
    assert (returned == sent) is kept
    assert 0 < len(returned) <= 64


async def test_prompts_are_truncated_from_the_left(client, engine) -> None:
    ids = list(range(10, 60))
    for limit, kept in ((7, 7), (50, 50), (99, 50), (-1, 50)):
        body = {"prompt": ids, "max_tokens": 2, "truncate_prompt_tokens": limit}
        response = await client.post("/v1/completions", json=body)
        assert response.json()["usage"]["prompt_tokens"] == kept
        assert list(engine.received.values())[-1][0] == ids[-kept:]
    long = {"prompt": list(range(1, 200)) * 25, "max_tokens": 100}  # more than the context
    assert (await client.post("/v1/completions", json=long)).status_code == 400
    response = await client.post("/v1/completions", json=long | {"truncate_prompt_tokens": -1})
    assert response.json()["usage"]["prompt_tokens"] == engine.max_model_len - 100
    chat = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 2}
    response = await client.post("/v1/chat/completions", json=chat | {"truncate_prompt_tokens": 3})
    assert response.json()["usage"]["prompt_tokens"] == 3
    for wrong in (0, -2):
        response = await client.post(
            "/v1/completions", json={"prompt": "a", "truncate_prompt_tokens": wrong}
        )
        assert response.json()["error"]["param"] == "truncate_prompt_tokens"
