"""What operators ask of a server: load, settings, live requests, an empty prefix cache."""

import asyncio

import httpx

from octavo.testing.fake_engine import NUM_BLOCKS, FakeEngine


async def test_load_and_live_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/load")).json()["server_load"] == 0
    assert (await client.get("/debug/requests")).json() == {"requests": []}
    engine.script.token_delay_s = 0.02
    running = asyncio.create_task(
        client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 10})
    )
    while not engine.live:
        await asyncio.sleep(0.001)
    load = (await client.get("/load")).json()
    assert load["server_load"] == load["num_requests_running"] == 1
    assert load["num_requests_waiting"] == 0
    assert load["kv_cache_usage_ratio"] == 1 / NUM_BLOCKS
    [status] = (await client.get("/debug/requests")).json()["requests"]
    assert status["status"] == "running" and status["num_prompt_tokens"] == 6
    response = await running
    assert status["request_id"].startswith(response.json()["id"])


async def test_server_info_tells_settings_and_where_they_came_from(
    client: httpx.AsyncClient,
) -> None:
    info = (await client.get("/server_info")).json()
    assert info["model"] == "fake-model" and info["version"]
    assert info["settings"]["max_num_seqs"] == {"value": "7", "source": "flag", "why": ""}


async def test_tokens_of_experts_are_told_where_they_are_counted(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    refused = await client.get("/debug/experts")
    assert refused.status_code == 404 and "--count-expert-tokens" in refused.text
    assert "sleeps" in refused.text
    engine.num_expert_tokens = {"blocks.0.mlp": [6, 0, 2, 0], "blocks.1.mlp": [0, 0, 0, 0]}
    assert (await client.get("/debug/experts")).json() == {
        "layers": {
            "blocks.0.mlp": {"imbalance": 3.0, "tokens": [6, 0, 2, 0]},
            "blocks.1.mlp": {"imbalance": 0.0, "tokens": [0, 0, 0, 0]},
        }
    }


async def test_reset_prefix_cache(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post("/reset_prefix_cache")).json() == {"status": "ok"}
    assert engine.num_resets == 1
    assert (await client.get("/reset_prefix_cache")).status_code == 405
