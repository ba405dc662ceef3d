"""/sleep, /wake_up and /is_sleeping: who waits, who is refused, what is told meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.helpers import client_of

from octavo.server import ServerConfig, create_app
from octavo.server.watchdog import State
from octavo.testing.fake_engine import FakeEngine

BODY = {"prompt": "Hello", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture
async def busy(
    client: httpx.AsyncClient, engine: FakeEngine
) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A completion that takes a fifth of a second, or as long as a test says."""
    engine.script.token_delay_s = 0.01
    task = asyncio.create_task(client.post("/v1/completions", json=BODY))
    while not engine.live:
        await asyncio.sleep(0.001)
    yield task
    engine.script.token_delay_s = 0.0
    await task


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name.removeprefix("octavo_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_night(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    awake = {"is_sleeping": False, "phase": "awake", "report": None}
    assert (await client.get("/is_sleeping")).json() == awake
    slept = await client.post("/sleep")
    assert slept.status_code == 200
    told = slept.json()
    assert told["is_sleeping"] and told["phase"] == "asleep"
    assert (told["report"]["level"], told["report"]["kv_cache_bytes"]) == (1, 2**21)
    assert (await client.get("/is_sleeping")).json() == told
    assert (await client.get("/server_info")).json()["sleep"] == told

    assert (await client.get("/health")).status_code == 200
    for path in ("/ready", "/v2/health/ready"):
        ready = await client.get(path)
        assert code(ready) == (503, "sleeping")
        assert ready.json()["state"] == "sleeping" and "/wake_up" in ready.text
    found = await samples(client)
    assert found["engine_state", "sleeping"] == 1 and found["engine_state", "ok"] == 0
    assert found["sleep_level",] == 1
    assert found["sleep_released_bytes", "kv_cache"] == 2**21
    assert found["sleep_released_bytes", "weights"] == 0

    assert (await client.post("/wake_up")).json() == awake
    assert (await client.get("/ready")).json()["state"] == "ok"
    found = await samples(client)
    assert found["engine_state", "sleeping"] == 0 and found["sleep_level",] == 0
    assert found["sleep_released_bytes", "kv_cache"] == 0
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/completions", BODY | {"stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/generate", {"inputs": "a"}),
        ("/v2/models/fake-model/generate", {"text_input": "a"}),
    ],
)
async def test_who_comes_meanwhile_is_told_when_to_come_again(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, object]
) -> None:
    await client.post("/sleep")
    refused = await client.post(path, json=body)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert "sleep" in refused.text and not engine.received
    # What needs no model is done nevertheless; what is wrong is wrong.
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": 1.5})).status_code == 400
    await client.post("/wake_up")
    assert (await client.post(path, json=body)).status_code == 200


async def test_a_response_in_the_background_fails_with_the_reason(
    client: httpx.AsyncClient,
) -> None:
    await client.post("/sleep")
    response = (await client.post("/v1/responses", json={"input": "a", "background": True})).json()
    while response["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.001)
        response = (await client.get(f"/v1/responses/{response['id']}")).json()
    assert response["status"] == "failed" and "sleeps" in response["error"]["message"]


async def test_a_refused_request_counts_as_refused(client: httpx.AsyncClient) -> None:
    await client.post("/sleep")
    assert code(await client.post("/v1/completions", json=BODY)) == (503, "sleeping")
    found = await samples(client)
    assert found["http_requests_total", "/v1/completions", "503"] == 1
    assert sum(v for (name, *_), v in found.items() if name == "request_success_total") == 0


async def test_sleep_and_wake_up_can_be_said_twice(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await client.post("/wake_up")).json()["phase"] == "awake"
    first = (await client.post("/sleep")).json()
    assert (await client.post("/sleep")).json() == first and engine.num_sleeps == 1
    deeper = (await client.post("/sleep?level=2")).json()
    assert deeper["report"]["level"] == 2 and engine.num_sleeps == 2
    assert (await client.post("/sleep?level=1")).json() == deeper and engine.num_sleeps == 2
    for _ in range(2):
        assert (await client.post("/wake_up")).json()["phase"] == "awake"


async def test_accepted_requests_end_first_and_new_ones_are_refused_already(
    client: httpx.AsyncClient, engine: FakeEngine, busy: asyncio.Task[httpx.Response]
) -> None:
    falling = asyncio.create_task(client.post("/sleep"))
    while (await client.get("/is_sleeping")).json()["phase"] != "finishing":
        await asyncio.sleep(0.001)
    assert code(await client.get("/ready")) == (503, "sleeping")
    assert code(await client.post("/v1/completions", json=BODY)) == (503, "sleeping")
    assert engine.num_sleeps == 0 and not busy.done()
    answer = await busy
    assert answer.json()["usage"]["completion_tokens"] == 20
    assert (await falling).json()["is_sleeping"]
    assert engine.num_sleeps == 1 and not engine.aborted


async def test_a_bound_that_is_too_short_leaves_all_as_it_was(
    client: httpx.AsyncClient, engine: FakeEngine, busy: asyncio.Task[httpx.Response]
) -> None:
    refused = await client.post("/sleep?timeout_s=0.05")
    assert code(refused) == (503, "busy") and "retry-after" in refused.headers
    assert "mode=abort" in refused.json()["error"]["message"]
    assert (await client.get("/ready")).status_code == 200
    assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 1})).status_code == 200
    assert (await busy).status_code == 200 and engine.num_sleeps == 0


async def test_the_bound_is_that_of_a_drain_where_none_is_given(engine: FakeEngine) -> None:
    engine.script.token_delay_s = 10.0
    async with client_of(engine, ServerConfig(drain_timeout_s=0.05)) as client:
        running = asyncio.create_task(client.post("/v1/completions", json=BODY))
        while not engine.live:
            await asyncio.sleep(0.001)
        refused = await client.post("/sleep")
        assert code(refused) == (503, "busy") and "0.05 s" in refused.text
        running.cancel()


async def test_who_is_aborted_is_told_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.token_delay_s = 0.02
    body = BODY | {"max_tokens": 2000}
    streamed = asyncio.create_task(client.post("/v1/completions", json=body | {"stream": True}))
    plain = asyncio.create_task(client.post("/v1/completions", json=body))
    while len(engine.live) < 2:
        await asyncio.sleep(0.001)
    assert (await client.post("/sleep?mode=abort&level=2")).json()["report"]["level"] == 2
    *_, last, done, rest = (await streamed).text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert (await streamed).text.count('"error"') == 1
    assert code(await plain) == (503, "cancelled")
    found = await samples(client)
    assert found["request_success_total", "abort"] == 2


async def test_calls_at_the_same_time_come_one_after_the_other(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.rest_delay_s = 0.02
    paths = ["/sleep", "/wake_up", "/sleep?level=2", "/sleep", "/wake_up", "/wake_up"]
    answers = await asyncio.gather(*(client.post(path) for path in paths))
    told = [answer.json() for answer in answers]
    assert [one["phase"] for one in told] == [
        "asleep",
        "awake",
        "asleep",
        "asleep",
        "awake",
        "awake",
    ]
    assert [one["report"] and one["report"]["level"] for one in told[:4]] == [1, None, 2, 2]
    assert engine.num_sleeps == 2 and engine.rest.is_awake


async def test_who_asked_may_go_away(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.rest_delay_s = 0.05
    task = asyncio.create_task(client.post("/sleep"))
    while engine.num_sleeps == 0:
        await asyncio.sleep(0.001)
    task.cancel()
    engine.script.rest_delay_s = 0.0
    assert (await client.post("/sleep")).json()["is_sleeping"] and engine.num_sleeps == 1


async def test_an_engine_that_cannot_wake_up_sleeps_on_and_says_no_path(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post("/sleep?level=2")
    engine.script.cannot_wake = "CheckpointError: /secret/model.safetensors is not there"
    failed = await client.post("/wake_up")
    assert code(failed) == (500, "wake_up_failed") and "secret" not in failed.text
    assert "/secret/model.safetensors is not there" in caplog.text
    assert (await client.get("/is_sleeping")).json()["is_sleeping"]
    assert code(await client.post("/v1/completions", json=BODY)) == (503, "sleeping")
    engine.script.cannot_wake = ""
    assert (await client.post("/wake_up")).status_code == 200
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_an_engine_that_dies_asleep_is_dead(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/sleep")
    engine.script.dead = True
    for path in ("/health", "/ready"):
        assert code(await client.get(path)) == (503, "engine_dead")
    for path in ("/sleep", "/sleep?level=2", "/wake_up"):
        assert code(await client.post(path)) == (503, "engine_dead")
    assert (await samples(client))["engine_state", "dead"] == 1


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/sleep?level=0", "level"),
        ("/sleep?level=3", "level"),
        ("/sleep?level=deep", "level"),
        ("/sleep?timeout_s=-1", "timeout_s"),
        ("/sleep?timeout_s=inf", "timeout_s"),
        ("/sleep?timeout_s=nan", "timeout_s"),
        ("/sleep?mode=keep", "mode"),
        ("/sleep?time_out=3", "time_out"),
        ("/wake_up?tags=weights", "tags"),
    ],
)
async def test_a_wrong_query_is_named(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, named: str
) -> None:
    refused = await client.post(path)
    assert refused.status_code == 400 and named in refused.json()["error"]["message"]
    assert engine.rest.is_awake and engine.num_sleeps == 0


async def test_the_document_shows_the_query(client: httpx.AsyncClient) -> None:
    operation = (await client.get("/openapi.json")).json()["paths"]["/sleep"]["post"]
    shown = {one["name"]: one for one in operation["parameters"]}
    assert shown.keys() == {"level", "mode", "timeout_s"} and "400" in operation["responses"]
    assert all(one["in"] == "query" and one["description"] for one in shown.values())
    assert shown["level"]["schema"]["maximum"] == 2


async def test_a_drain_is_told_before_sleep_and_refuses_both(engine: FakeEngine) -> None:
    app = create_app(engine, ServerConfig())
    state = app.state.octavo
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        await client.post("/sleep")
        assert state.condition().state is State.SLEEPING
        state.draining = True
        assert state.condition().state is State.DRAINING
        for path in ("/sleep", "/wake_up"):
            assert code(await client.post(path)) == (503, "draining")
