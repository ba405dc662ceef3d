"""Log lines: JSON for machines, one for each response, and no word of what was asked."""

import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from server.helpers import CONFIG, client_of

from octavo.engine.logs import REQUEST_ID, JsonFormatter
from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine

SECRET = "a word that no log may hold"


class Lines(logging.Handler):
    """Keeps what the formatter makes of each record, as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.kept: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> AsyncIterator[list[dict[str, object]]]:
    handler = Lines()
    root = logging.getLogger("octavo")
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield handler.kept
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_record_is_one_line_of_json(lines: list[dict[str, object]]) -> None:
    logger = logging.getLogger("octavo.some.part")
    logger.warning("two\nlines of %s", "text", extra={"request_id": "r", "unknown": "left out"})
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    first, second = lines
    assert set(first) == {"time", "level", "logger", "message", "request_id"}
    assert first["message"] == "two\nlines of text" and first["request_id"] == "r"
    assert (first["level"], first["logger"]) == ("warning", "octavo.some.part")
    assert str(first["time"]).endswith("Z") and "." in str(first["time"])
    assert "ValueError: why" in str(second["exception"]) and "request_id" not in second


def test_a_record_of_a_request_has_its_id(lines: list[dict[str, object]]) -> None:
    token = REQUEST_ID.set("mine")
    logging.getLogger("octavo.deep.down").info("something")
    REQUEST_ID.reset(token)
    logging.getLogger("octavo.deep.down").info("something")
    assert [line.get("request_id") for line in lines] == ["mine", None]


async def test_each_response_is_one_line_where_that_is_wanted(
    lines: list[dict[str, object]],
) -> None:
    engine = FakeEngine()
    async with client_of(engine, replace(CONFIG, log_requests=True)) as client:
        await client.post(
            "/v1/completions",
            json={"prompt": "Hello", "max_tokens": 5, "n": 2, "user": SECRET},
            headers={"x-request-id": "mine"},
        )
        chat = {"messages": [{"role": "user", "content": SECRET}], "stream": True}
        await client.post("/v1/chat/completions", json=chat)
        await client.post("/v1/completions", json={"prompt": SECRET, "n": -1})
        await client.get(f"/{SECRET.replace(' ', '-')}/{SECRET}")
        engine.script.fail_after, engine.script.failure = 0, ValueError("of ours")
        await client.post("/v1/completions", json={"prompt": SECRET}, headers={"x-request-id": "b"})
    access = [line for line in lines if line["logger"] == "octavo.server.access"]
    facts = [(line["method"], line["route"], line["status"]) for line in access]
    assert facts == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/completions", 400),
        ("GET", "unmatched", 404),
        ("POST", "/v1/completions", 500),
    ]
    first = access[0]
    assert first["request_id"] == "mine" and 0 <= first["duration_s"] < 10
    assert (first["num_prompt_tokens"], first["num_output_tokens"]) == (6, 10)
    assert access[1]["num_output_tokens"] > 5 and access[2]["num_output_tokens"] == 0
    failures = [line for line in lines if "exception" in line]
    assert [line["request_id"] for line in failures] == ["b"]
    assert SECRET not in json.dumps(lines) and SECRET.replace(" ", "-") not in json.dumps(lines)


async def test_by_default_nothing_is_said_of_a_response(
    client: httpx.AsyncClient, lines: list[dict[str, object]]
) -> None:
    await client.post("/v1/completions", json={"prompt": "Hello"})
    assert lines == []


def test_a_front_end_can_be_told_to_log_json() -> None:
    code = (
        "import logging; from octavo.engine.logs import configure_logs as c;"
        "c('json', logging.INFO); logging.getLogger('any').info('hello')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(run.stderr)["message"] == "hello"


@pytest.mark.parametrize(
    "wrong",
    [{"log_format": "xml"}, {"watchdog_action": "panic"}, {"watchdog_timeout_s": 0}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)
