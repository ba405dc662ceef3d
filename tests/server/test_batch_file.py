"""OpenAI's batch files: every line is answered once, by the same rules as over HTTP."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from octavo.server import ServerConfig, create_app
from octavo.server.batch_file import answers_to
from octavo.testing.fake_engine import FakeEngine


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> str:
    body = {"prompt": "Hello", "max_tokens": 4} | body
    request = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(request) + "\n"


async def answer(
    lines: list[str],
    engine: FakeEngine,
    *,
    done: frozenset[str] = frozenset(),
    concurrency: int = 8,
) -> list[dict[str, Any]]:
    app = create_app(engine, ServerConfig())
    answers = [a async for a in answers_to(app, lines, done=done, concurrency=concurrency)]
    assert not engine.live
    return answers


async def test_answers_are_those_of_the_server(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    lines = [line("a"), line("b", max_tokens=0), line("c", model="other")]
    lines.append(line("d", "/v1/chat/completions", messages=messages, prompt=None))
    answers = {a["custom_id"]: a for a in await answer(lines, FakeEngine())}
    assert set(answers) == {"a", "b", "c", "d"}
    assert all(a["error"] is None and a["id"].startswith("batch_req_") for a in answers.values())
    statuses = {name: a["response"]["status_code"] for name, a in answers.items()}
    assert statuses == {"a": 200, "b": 400, "c": 404, "d": 200}
    over_http = await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4})
    body = answers["a"]["response"]["body"]
    assert body["choices"] == over_http.json()["choices"] and body["usage"]["total_tokens"] == 10
    assert answers["b"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert answers["a"]["response"]["request_id"]


WRONG = {
    "invalid_line": ["not json", "{}", '{"custom_id": 3}'],
    "invalid_url": [line("x", "/metrics"), line("x", "/v1/completions/../../metrics")],
    "stream_in_batch": [line("x", stream=True)],
    "duplicate_custom_id": [line("good")],
}


@pytest.mark.parametrize("code", WRONG)
async def test_what_is_no_request_is_answered_with_an_error(code: str) -> None:
    for wrong in WRONG[code]:
        answers = await answer([line("good"), "\n", wrong, line("last")], FakeEngine())
        errors = [a["error"] for a in answers if a["error"]]
        assert [error["code"] for error in errors] == [code] and "line 3" in errors[0]["message"]
        assert len(answers) == 3


async def test_no_more_run_at_once_than_asked_and_done_ones_not_again() -> None:
    engine = FakeEngine()
    engine.script.token_delay_s = 0.002
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(engine.live))
            await asyncio.sleep(0.0005)

    watching = asyncio.create_task(watch())
    done = frozenset({"3", "4"})
    answers = await answer([line(str(i)) for i in range(20)], engine, done=done, concurrency=4)
    watching.cancel()
    assert {a["custom_id"] for a in answers} == {str(i) for i in range(20)} - done
    assert 2 <= most <= 4


async def test_an_overload_is_an_answer() -> None:
    engine = FakeEngine()
    engine.script.max_requests = 0
    [refused] = await answer([line("a")], engine)
    assert refused["response"]["status_code"] == 503
