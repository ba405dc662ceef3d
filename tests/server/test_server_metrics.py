"""/metrics: what is there from the start, and numbers that add up."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

import octavo
from octavo.testing.fake_engine import NUM_BLOCKS, FakeEngine


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Every sample: its name without our prefix, then its label values in order of their names."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels)]
            found[sample.name.removeprefix("octavo_"), *labels] = sample.value
    return found


async def test_rates_exist_before_the_first_request(client: httpx.AsyncClient) -> None:
    found = await samples(client)
    for reason in ("stop", "length", "abort", "error"):
        assert found["request_success_total", reason] == 0
    assert found["time_to_first_token_seconds_count",] == 0
    assert found["build_info", octavo.__version__] == 1
    assert found["engine_up",] == 1
    assert found["process_resident_memory_bytes",] > 2**20
    assert not [key for key in found if key[0].endswith("_created")]


async def test_a_request_is_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5, "n": 2})
    await client.post("/v1/completions", json={"prompt": "Hello", "stop": "0", "stream": True})
    await client.post("/v1/completions", json={"prompt": []})
    await client.get("/v1/models/nope")
    await client.get("/nope/with/endless/variety")
    engine.script.fail_after = 1
    await client.post("/v1/completions", json={"prompt": "Hello"})
    found = await samples(client)
    assert found["request_success_total", "length"] == 2
    assert found["request_success_total", "stop"] == 1
    assert found["request_success_total", "error"] == 1
    assert found["request_success_total", "abort"] == 0
    assert found["prompt_tokens_total",] == 18
    assert found["generation_tokens_total",] == 10 + 8 + 1
    assert found["http_requests_total", "200", "/v1/completions"] == 2
    assert found["http_requests_total", "400", "/v1/completions"] == 1
    assert found["http_requests_total", "500", "/v1/completions"] == 1
    assert found["http_requests_total", "404", "/v1/models/{model:path}"] == 1
    assert found["http_requests_total", "404", "unmatched"] == 1
    assert found["time_to_first_token_seconds_count",] == 4
    assert found["inter_token_latency_seconds_count",] == 4 + 4 + 7
    assert found["e2e_request_latency_seconds_count",] == 4
    for phase in ("queue", "prefill", "decode"):
        assert found[f"request_{phase}_time_seconds_count",] == 4
    assert found["request_prompt_tokens_count",] == found["request_generation_tokens_count",] == 4
    assert found["request_prompt_tokens_sum",] == 4 * 6
    assert found["request_generation_tokens_sum",] == 10 + 8 + 1
    assert found["num_requests_running",] == 0
    assert found["kv_blocks_free",] == found["kv_blocks",] == NUM_BLOCKS
    assert found["kv_cache_usage_ratio",] == 0


async def test_times_of_an_answer_are_told_apart(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.queue_delay_s, engine.script.token_delay_s = 0.2, 0.01
    await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5})
    found = await samples(client)
    assert found["request_queue_time_seconds_sum",] == 0.2
    assert found["request_prefill_time_seconds_sum",] == 0
    assert found["time_to_first_token_seconds_sum",] >= 0.2
    decode_s = found["request_decode_time_seconds_sum",]
    assert decode_s >= 4 * 0.01
    e2e_s = found["e2e_request_latency_seconds_sum",]
    assert abs(found["time_to_first_token_seconds_sum",] + decode_s - e2e_s) < 0.01


async def test_an_answer_that_never_began_has_no_times_but_an_end(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.fail_after = 0
    await client.post("/v1/completions", json={"prompt": "Hello"})
    found = await samples(client)
    assert found["request_success_total", "error"] == 1
    assert found["e2e_request_latency_seconds_count",] == 1
    assert found["request_generation_tokens_sum",] == 0
    for phase in ("queue", "prefill", "decode"):
        assert found[f"request_{phase}_time_seconds_count",] == 0


async def test_a_dead_engine_can_still_be_seen(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.dead = True
    assert (await samples(client))["engine_up",] == 0
