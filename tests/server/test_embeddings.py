"""/v1/embeddings: forms of input and output, refusals, and that every bound of the server holds."""

import asyncio
import base64
from array import array
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.helpers import CONFIG, client_of
from server.test_server_keys import bearer, entry

from octavo.core import NO_TOKENS, PoolingParams
from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine, fake_vector

URL = "/v1/embeddings"
HI, HO = [72, 105], [72, 111]


class Recorder(FakeEngine):
    """Remembers how it was asked to pool."""

    def generate(self, request_id, prompt_token_ids, sampling, options, **more):  # type: ignore[no-untyped-def,override]
        self.asked = (prompt_token_ids, sampling, options, more["pooling"])
        return super().generate(request_id, prompt_token_ids, sampling, options, **more)


def vector_of(token_ids: list[int]) -> list[float]:
    return array("f", fake_vector(token_ids)).tolist()


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Hi", [[256, *HI]]),
        (["Hi", "Ho"], [[256, *HI], [256, *HO]]),
        (HI, [HI]),
        ([HI, HO], [HI, HO]),
    ],
    ids=str,
)
async def test_forms_of_input(client: httpx.AsyncClient, given: Any, prompts: Any) -> None:
    response = await client.post(URL, json={"model": "fake-model", "input": given})
    assert response.status_code == 200, response.text
    document = response.json()
    assert (document["object"], document["model"]) == ("list", "fake-model")
    assert document["id"].startswith("embd-")
    assert document["data"] == [
        {"object": "embedding", "index": index, "embedding": vector_of(prompt)}
        for index, prompt in enumerate(prompts)
    ]
    num_tokens = sum(map(len, prompts))
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"] == num_tokens


async def test_base64_is_float32_little_endian(client: httpx.AsyncClient) -> None:
    body = {"input": HI, "encoding_format": "base64"}
    [item] = (await client.post(URL, json=body)).json()["data"]
    assert base64.b64decode(item["embedding"]) == bytes.fromhex("000000400000904200 00d242")


@pytest.mark.parametrize("default", ["last", "mean"])
async def test_the_request_or_else_the_server_says_how_to_pool(default: Any) -> None:
    engine = Recorder()
    async with client_of(engine, ServerConfig(pooling=default)) as client:
        body = {"input": HI, "user": "me", "priority": 3, "cache_salt": "s", "tenant": "t"}
        assert (await client.post(URL, json=body)).status_code == 200
        prompt, sampling, options, pooling = engine.asked
        assert (prompt, sampling, pooling) == (HI, NO_TOKENS, PoolingParams(pooling=default))
        assert (options.priority, options.cache_salt, options.tenant) == (3, "s", "t")
        await client.post(URL, json=body | {"pooling": "mean", "normalize": False})
        assert engine.asked[3] == PoolingParams(pooling="mean", normalize=False)
    with pytest.raises(ConfigError, match="pooling must be one of"):
        ServerConfig(pooling="median")  # type: ignore[arg-type]


async def test_truncation_keeps_the_end(client: httpx.AsyncClient) -> None:
    body = {"input": [5] * 5000, "truncate_prompt_tokens": -1}
    document = (await client.post(URL, json=body)).json()
    assert document["usage"]["prompt_tokens"] == 4096  # nothing has to fit behind the prompt
    document = (await client.post(URL, json=body | {"truncate_prompt_tokens": 3})).json()
    assert document["data"][0]["embedding"] == [3.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": [[]]}, "input"),
        ({"input": ["Hi", 5]}, "input"),
        ({"input": ["Hi", [5]]}, "input"),
        ({"input": [258]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [1.0]}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5] * 4097}, "input"),
        ({"input": "x" * 80_000}, "input"),
        ({"input": ["x"] * 2000}, "input"),
        ({"input": "Hi", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "Hi", "pooling": "max"}, "pooling"),
        ({"input": "Hi", "normalize": 1}, "normalize"),
        ({"input": "Hi", "dimensions": 3}, "dimensions"),
        ({"input": "Hi", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "Hi", "cache_salt": ""}, "cache_salt"),
        ({"input": "Hi", "deadline_ms": 0}, "deadline_ms"),
        ({"input": "Hi", "priority": 2**40}, "priority"),
        ({"input": "Hi", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"input": "Hi", "model": "gpt-9"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_wrong_fields(client: httpx.AsyncClient, fields: Any, param: str | None) -> None:
    response = await client.post(URL, json=fields)
    if param is None:  # an empty text has its BOS
        assert response.status_code == 200
        return
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).split("[")[0] == param


async def test_a_prompt_may_fill_the_context(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, json={"input": [5] * 4096})).status_code == 200


async def test_tokens_count_for_the_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", "k-a", max_tokens=10, tenant="red"))
    engine = Recorder()
    async with client_of(engine, ServerConfig(api_key_file=str(path))) as client:
        statuses = [
            (await client.post(URL, json={"input": [5] * n}, headers=bearer("k-a"))).status_code
            for n in (6, 5, 4, 1)
        ]
        assert statuses == [200, 429, 200, 429]
        assert engine.asked[2].tenant == "red"
        assert engine.asked[2].cache_salt is not None  # prefixes of a tenant are its own
        assert (await client.post(URL, json={"input": "x"})).status_code == 401


async def test_overload_death_and_failure(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.max_requests = 0
    response = await client.post(URL, json={"input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    engine.script.max_requests = None
    engine.script.fail_after = 0
    response = await client.post(URL, json={"input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    engine.script.dead = True
    assert (await client.post(URL, json={"input": "Hi"})).status_code == 503


async def test_metrics_and_live_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.queue_delay_s = 0.2
    task = asyncio.create_task(client.post(URL, json={"input": [HI, HO]}))
    while len(engine.live) < 2:
        await asyncio.sleep(0.01)
    listed = (await client.get("/debug/requests")).text
    assert all(request_id in listed for request_id in engine.live)
    assert (await task).status_code == 200
    metrics = (await client.get("/metrics")).text
    assert 'octavo_request_success_total{finished_reason="stop"} 2.0' in metrics
    assert "octavo_request_prompt_tokens_sum 4.0" in metrics
    assert "octavo_request_generation_tokens_sum 0.0" in metrics
    assert "octavo_request_prefill_time_seconds_count 2.0" in metrics
    assert "octavo_time_to_first_token_seconds_count 0.0" in metrics


async def test_without_a_tokenizer_ids_are_enough() -> None:
    from octavo.engine import ServedModel
    from octavo.text import NoTokenizer

    engine = FakeEngine()
    tokenizer = engine.model.tokenizer
    async with client_of(engine, CONFIG) as client:
        engine.model = ServedModel("fake-model", 4096, 258, NoTokenizer())
        refused = await client.post(URL, json={"input": "Hi"})
        assert refused.status_code == 400
        engine.model = ServedModel("fake-model", 4096, 258, tokenizer)
        response = await client.post(URL, json={"input": HI})
        assert response.json()["data"][0]["embedding"] == vector_of(HI)
