"""/metrics: names that dashboards rely on, and numbers that add up."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from octavo.testing.fake_engine import NUM_BLOCKS, FakeEngine


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Every sample: its name without our prefix, then its label values in order of their names."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels)]
            found[sample.name.removeprefix("octavo:"), *labels] = sample.value
    return found


async def test_names_exist_before_the_first_request(client: httpx.AsyncClient) -> None:
    names = {key[0] for key in await samples(client)}
    assert names >= {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "kv_blocks_free",
        "kv_blocks_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
    }


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
    assert found["num_requests_running",] == 0
    assert found["kv_blocks_free",] == found["kv_blocks_total",] == NUM_BLOCKS
    assert found["kv_cache_usage_perc",] == 0
