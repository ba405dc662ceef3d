"""The fault table's rows that a request alone can cause: each is refused, named, and harmless."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from server.helpers import client_of

from octavo.errors import EngineDeadError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]


def check_error(response: httpx.Response, status: int, kind: str = "invalid_request_error") -> Any:
    """An OpenAI error object that gives nothing away; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert "/work" not in error["message"] and ".py" not in error["message"]
    assert " at 0x" not in error["message"] and "<" not in error["message"]
    return error


async def check_still_serving(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "ok", "max_tokens": 50})
    assert response.json()["choices"][0]["text"] == "Answer 0 to: ok"
    assert not engine.live


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


NOT_JSON = {
    "empty": b"",
    "text": b"hello",
    "truncated": b'{"prompt": "a"',
    "trailing": b'{"prompt": "a"} x',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "bad utf-8": b'{"prompt": "\xff"}',
    "lone surrogate": rb'{"prompt": "\ud800 and more text"}',
    "deep": f'{{"prompt": "a", "metadata": {deep(10_000)}}}'.encode(),
    "deep refused field": f'{{"prompt": "a", "tools": {deep(10_000)}}}'.encode(),
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_f01_f05_not_json(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post(path, content=body, headers=headers)
    if b"temperature" not in body and b"prompt" not in body or path == COMPLETIONS:
        assert check_error(response, 400)["code"] == "invalid_json"
    else:
        check_error(response, 400)  # or, on a route without that field, that another is missing
    await check_still_serving(client, engine)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_f01_wrong_content_type(client: httpx.AsyncClient, content_type: str) -> None:
    headers = {"content-type": content_type}
    response = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert check_error(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b'"a"', b"1"])
async def test_f01_no_object(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    check_error(await client.post(COMPLETIONS, content=body, headers=headers), 400)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_f02_too_large(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"prompt": "x" * 300_000})
    assert check_error(response, 413)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"

    async def chunks() -> Any:
        for _ in range(10_000):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    response = await client.post(path, content=chunks(), headers=headers)
    check_error(response, 413)


async def test_f03_many_headers(client: httpx.AsyncClient) -> None:
    headers = {f"x-header-{i}": "x" for i in range(120)}
    check_error(await client.get("/health", headers=headers), 431)


async def test_f05_hostile_numbers_and_objects(engine: FakeEngine) -> None:
    digits = "9" * 1_000_000
    keys = ",".join(f'"k{i}":0' for i in range(1_000_000))
    async with client_of(engine, ServerConfig(max_request_bytes=2**24)) as client:
        for body in (
            f'{{"prompt": "a", "n": {digits}}}',
            f'{{"prompt": "a", "n": {digits[:4300]}}}',
            f'{{"prompt": "a", "temperature": {digits}}}',
            f'{{"prompt": "a", "logit_bias": {{{keys}}}}}',
            f'{{"prompt": "a", "tools": {{{keys}}}}}'.replace("tools", "structured_outputs"),
        ):
            headers = {"content-type": "application/json"}
            response = await client.post(COMPLETIONS, content=body.encode(), headers=headers)
            error = check_error(response, 400)
            assert error["param"] in body[:60]
            assert len(error["message"]) < 400
            assert response.elapsed.total_seconds() < 0.5
        await check_still_serving(client, engine)


FIELDS: list[tuple[str, str, dict[str, Any], str]] = [
    ("F06", COMPLETIONS, {"prompt": ...}, "prompt"),
    ("F06", COMPLETIONS, {"prompt": None}, "prompt"),
    ("F06", COMPLETIONS, {"prompt": 5}, "prompt"),
    ("F06", COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    ("F06", COMPLETIONS, {"prompt": ["a", [1]]}, "prompt"),
    ("F06", COMPLETIONS, {"prompt": ["a", None]}, "prompt"),
    ("F06", CHAT, {"messages": ...}, "messages"),
    ("F06", CHAT, {"messages": None}, "messages"),
    ("F06", CHAT, {"messages": "hello"}, "messages"),
    ("F06", CHAT, {"messages": []}, "messages"),
    ("F06", CHAT, {"messages": ["hello"]}, "messages"),
    ("F06", CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
    ("F06", CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ("F06", CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("F06", CHAT, {"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
    ("F06", CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("F07", COMPLETIONS, {"prompt": []}, "prompt"),
    ("F07", COMPLETIONS, {"prompt": [[]]}, "prompt"),
    ("F07", COMPLETIONS, {"prompt": [[1], []]}, "prompt"),
    ("F07", COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt"),
    ("F09", COMPLETIONS, {"prompt": "a", "max_tokens": 4096}, "max_tokens"),
    ("F09", COMPLETIONS, {"prompt": "a" * 5000}, "prompt"),
    ("F09", COMPLETIONS, {"prompt": [1] * 5000}, "prompt"),
    ("F09", CHAT, {"max_tokens": 4096}, "max_tokens"),
    ("F10", COMPLETIONS, {"prompt": "a" * 150_000}, "prompt"),
    (
        "F10",
        CHAT,
        {"messages": [{"role": "user", "content": "a", "name": "a" * 150_000}]},
        "messages",
    ),
    ("F09", CHAT, {"messages": [{"role": "user", "content": ""}] * 5_000}, "messages"),
    ("F09", CHAT, {"max_completion_tokens": 4096}, "max_completion_tokens"),
    ("F10", CHAT, {"messages": [{"role": "user", "content": "a" * 150_000}]}, "messages"),
    *[
        ("F12", path, {name: value}, name)
        for path in (COMPLETIONS, CHAT)
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p")
        for value in (-2.5, 1e308, "1", True, [])
    ],
    ("F12", COMPLETIONS, {"top_p": 0}, "top_p"),
    ("F12", COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    ("F12", COMPLETIONS, {"top_k": -2}, "top_k"),
    *[("F13", path, {"n": n}, "n") for path in (COMPLETIONS, CHAT) for n in (10**9, 0, -1, 1.0)],
    ("F13", COMPLETIONS, {"n": True}, "n"),
    ("F13", COMPLETIONS, {"n": 128, "prompt": ["a"] * 1000}, "n"),
    ("F13", COMPLETIONS, {"prompt": ["a"] * 2000}, "prompt"),
    *[("F13", COMPLETIONS, {"best_of": n}, "best_of") for n in (10**9, 0, -1, 2)],
    *[("F14", COMPLETIONS, {"logprobs": n}, "logprobs") for n in (10**6, -1, True, 1.5)],
    ("F14", CHAT, {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ("F14", CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ("F14", CHAT, {"top_logprobs": 1}, "top_logprobs"),
    ("F14", CHAT, {"logprobs": 5}, "logprobs"),
    *[
        ("F14", path, {"prompt_logprobs": n}, "prompt_logprobs")
        for path in (COMPLETIONS, CHAT)
        for n in (21, -1, True, 1.5)
    ],
    ("F14", CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    *[
        ("F15", path, {"max_tokens": n}, "max_tokens")
        for path in (COMPLETIONS, CHAT)
        for n in (0, -5, 2**63, 1.5, "7")
    ],
    ("F15", CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("F15", CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ("F15", COMPLETIONS, {"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    *[("F16", COMPLETIONS, {"prompt": [72, i]}, "prompt") for i in (258, -1, True, 1.0, 2**70)],
    *[("F16", COMPLETIONS, {"prompt": [[72], [i]]}, "prompt") for i in (258, -1, True, 1.0)],
    ("F16", COMPLETIONS, {"prompt": [72, -1], "echo": True}, "prompt"),
    ("F16", COMPLETIONS, {"prompt": [72, 258], "echo": True}, "prompt"),
    ("F18", COMPLETIONS, {"stop": ["a"] * 10_000}, "stop"),
    ("F18", COMPLETIONS, {"stop": ""}, "stop"),
    ("F18", COMPLETIONS, {"stop": ["a", ""]}, "stop"),
    ("F18", COMPLETIONS, {"stop": "a" * 100_000}, "stop"),
    ("F18", COMPLETIONS, {"stop": [1]}, "stop"),
    ("F19", COMPLETIONS, {"logit_bias": {"a": 1}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {"\u0663": 1}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {"258": 1}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {"1": 101}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {"1": True}}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": [1]}, "logit_bias"),
    ("F19", COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(15_000)}}, "logit_bias"),
    ("F19", COMPLETIONS, {"stop_token_ids": [258]}, "stop_token_ids"),
    ("F19", COMPLETIONS, {"allowed_token_ids": []}, "allowed_token_ids"),
    ("F20", COMPLETIONS, {"seed": 2**63}, "seed"),
    ("F20", COMPLETIONS, {"seed": -(2**63) - 1}, "seed"),
    ("F20", COMPLETIONS, {"seed": 1.0}, "seed"),
    ("F21", CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    ("F22", COMPLETIONS, {"guided_regex": "(a+)+$"}, "guided_regex"),
    ("F24", CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    ("F24", CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ("F25", CHAT, {"tools": [{"type": "function"}]}, "tools"),
    ("F25", CHAT, {"functions": [{"name": "f"}]}, "functions"),
    ("F32", COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ("", COMPLETIONS, {"suffix": "x"}, "suffix"),
    ("", CHAT, {"audio": {"voice": "x"}}, "audio"),
    ("", CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    ("", COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (
        "",
        CHAT,
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    ("", COMPLETIONS, {"stream": "yes"}, "stream"),
    (
        "F27",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("row", "path", "fields", "param"), FIELDS)
async def test_wrong_field(
    client: httpx.AsyncClient,
    row: str,
    path: str,
    fields: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    body: dict[str, Any] = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": MESSAGES}
    if stream and "stream_options" not in fields:
        body["stream"] = True
    body |= fields
    sent = {name: value for name, value in body.items() if value is not ...}
    error = check_error(await client.post(path, json=sent), 400)
    assert error["param"] == param
    if row == "F09":
        assert error["code"] == "context_length_exceeded"
        assert "4096" in error["message"]
    if row == "F10":
        assert error["code"] == "context_length_exceeded"
        assert " characters, more than" in error["message"]


async def test_f07_empty_text_is_a_begin_of_sequence(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "", "max_tokens": 50})
    assert response.json()["choices"][0]["text"] == "Answer 0 to: "


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_f08_unknown_model(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": "gpt-9", "prompt": "a", "tokens": [1]}
    body |= {"messages": MESSAGES} if path == CHAT else {}
    error = check_error(await client.post(path, json=body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error = check_error(await client.get("/v1/models/gpt-9"), 404)
    assert error["code"] == "model_not_found"


async def test_f09_names_both_numbers(client: httpx.AsyncClient) -> None:
    body = {"prompt": "abc", "max_tokens": 4093}
    error = check_error(await client.post(COMPLETIONS, json=body), 400)
    assert "4 tokens" in error["message"] and "4093" in error["message"]
    body["max_tokens"] = 4092
    assert (await client.post(COMPLETIONS, json=body)).status_code == 200


async def test_f16_detokenize(client: httpx.AsyncClient) -> None:
    for tokens in ([258], [-1], [1] * 5000, ["a"], [True]):
        error = check_error(await client.post("/detokenize", json={"tokens": tokens}), 400)
        assert error["param"].startswith("tokens")


async def test_tokenize_wants_one_of_two(client: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": MESSAGES}):
        assert check_error(await client.post("/tokenize", json=body), 400)["param"] == "prompt"


async def test_f34_routes_and_methods(client: httpx.AsyncClient) -> None:
    for path in ("/nope", "/v1/completions/", "//v1/models", "/v1"):
        check_error(await client.get(path), 404)
    response = await client.get(COMPLETIONS)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    check_error(await client.post("/health"), 405)
    check_error(await client.delete("/v1/models/fake-model"), 405)


@pytest.mark.parametrize("stream", [False, True])
async def test_f37_overload(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    engine.script.max_requests = 0
    response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert check_error(response, 503, "server_error")["code"] == "overloaded"
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
async def test_second_prompt_refused(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.script.max_requests = 1
    body = {"prompt": ["a", "b"], "stream": stream}
    check_error(await client.post(COMPLETIONS, json=body), 503, "server_error")
    assert len(engine.aborted) == 1 and not engine.live


@pytest.mark.parametrize("stream", [False, True])
async def test_dead_engine(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    engine.script.dead = True
    response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert check_error(response, 503, "server_error")["code"] == "engine_dead"
    for path in ("/health", "/ready"):
        error = check_error(await client.get(path), 503, "server_error")
        assert error["code"] == "engine_dead"


FAILURES: list[tuple[BaseException | str, int, str, str]] = [
    (asyncio.CancelledError(), 503, "cancelled", "the server cancelled the request"),
    ("the logits were not numbers", 500, "generation_failed", "the logits were not numbers"),
    (EngineDeadError("/secret/path.py died"), 503, "engine_dead", "the engine is not running"),
    (ValueError("<object at 0x7f>"), 500, "internal_error", "internal error"),
]


@pytest.mark.parametrize(("failure", "status", "code", "message"), FAILURES)
async def test_failure_of_an_answer(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    failure: BaseException | str,
    status: int,
    code: str,
    message: str,
) -> None:
    engine.script.failure = failure
    for fail_after in (0, 3):
        engine.script.fail_after = fail_after
        body = {"messages": MESSAGES, "n": 2}
        error = check_error(await client.post(CHAT, json=body), status, "server_error")
        assert error["code"] == code
        assert error["message"].startswith(message)
    response = await client.post(CHAT, json=body | {"stream": True})
    assert response.status_code == 200  # it came when the stream had begun
    *chunks, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == (code, "server_error")
    texts = [json.loads(c.removeprefix("data: "))["choices"][0]["delta"] for c in chunks]
    assert sum(len(delta["content"]) for delta in texts) == 6  # all that came before is delivered
    engine.script.fail_after = None
    await check_still_serving(client, engine)
