"""Hostile requests and requests made of the OpenAPI document: the ordinary run of both."""

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fuzz import http_play
from fuzz.http_cases import MAX_BODY_BYTES, TEMPLATES, HttpCase, draw_http_case
from fuzz.http_play import BrokenPromise, check_good, fuzz_http, play, replay, target
from hypothesis import HealthCheck, Phase, given, settings
from server.helpers import LiveServer

FIRST = int(os.environ.get("OCTAVO_FUZZ_FIRST", "0"))
NUM_REQUESTS = int(os.environ.get("OCTAVO_FUZZ_REQUESTS", "2000"))
NUM_EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "8"))  # of each route
GOOD = b"GET /v1/models HTTP/1.1\r\nHost: octavo\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with target() as live:
        yield live


@pytest.fixture
def healed(live: LiveServer) -> Iterator[LiveServer]:
    """The server, whose engine a test may break."""
    script = live.engine.script
    before = script.fail_after, script.failure, script.token_delay_s
    yield live
    script.fail_after, script.failure, script.token_delay_s = before


def test_hostile_requests_are_answered_properly() -> None:
    report = fuzz_http(FIRST, FIRST + NUM_REQUESTS)
    failures = [f"{what}\nreplay: {replay(seed)}" for seed, what in report.failures.items()]
    assert not failures, f"{len(failures)} of {report.num_cases} requests:\n" + "\n".join(failures)
    # Some must pass and most be refused, in many ways: else the dice reach one kind of case only.
    assert report.outcomes["200"] > NUM_REQUESTS / 20
    assert report.outcomes["400 invalid_request_error"] > NUM_REQUESTS / 5
    assert len(report.outcomes) > 8


def test_a_seed_is_a_request() -> None:
    assert draw_http_case(7) == draw_http_case(7)
    assert len({draw_http_case(seed).wire for seed in range(300)}) > 250
    assert replay(12).endswith("-m fuzz.http_play --seed 12")


def test_all_routes_are_attacked() -> None:
    notes = [draw_http_case(seed).note for seed in range(3000)]
    for method, path, _, _ in TEMPLATES:
        prefix = f"{method} {path.partition('{')[0]}"
        assert any(note.startswith(prefix) for note in notes), prefix


def sent(live: LiveServer, wire: bytes, method: str = "POST") -> str:
    return play(live, HttpCase(0, method, wire, "by hand"))


def completion(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: octavo\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def test_answers_have_their_names(live: LiveServer) -> None:
    assert sent(live, GOOD, "GET") == "200"
    assert sent(live, completion(b'{"prompt": "a", "stream": true}')) == "200 stream"
    assert sent(live, completion(b"{")) == "400 invalid_json"
    assert sent(live, completion(b'{"prompt": NaN}')) == "400 invalid_json"
    assert sent(live, b"\x16\x03\x01\r\n\r\n") == "400 below"
    assert sent(live, completion(b" " * (MAX_BODY_BYTES + 1))) in (
        "413 request_too_large",
        "closed",
    )
    check_good(live)


def test_an_error_is_no_longer_than_a_paragraph(live: LiveServer) -> None:
    body = b'{"input": "a", "truncation": "%s"}' % (b"x" * 5000)
    wire = completion(body).replace(b"completions", b"responses")
    assert sent(live, wire) == "400 invalid_request_error"
    assert (
        sent(live, completion(b'{"prompt": [%s]}' % (b"1" * 4000))) == "400 invalid_request_error"
    )


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(ValueError("x"), "500"), ("read /usr/lib/x.py", "500")],
    ids=["exception", "ended"],
)
def test_broken_promises_are_seen(healed: LiveServer, failure: BaseException, seen: str) -> None:
    healed.engine.script.fail_after, healed.engine.script.failure = 0, failure
    with pytest.raises(BrokenPromise, match=seen):
        sent(healed, completion(b'{"prompt": "a"}'))
    with pytest.raises(BrokenPromise, match="went wrong afterwards"):
        check_good(healed)


def test_what_tells_too_much_is_seen(healed: LiveServer) -> None:
    healed.engine.script.fail_after = 1
    healed.engine.script.failure = f"cannot read {http_play.ROOT}/x"
    with pytest.raises(BrokenPromise, match="too much"):
        sent(healed, completion(b'{"prompt": "a", "stream": true}'))
    for message in ("at 0x7f12ab34cd56", "<class 'int'>", "octavo.server.app", "Traceback"):
        assert http_play.TELLING.search(f"a {message} b"), message
    for message in ("the context of 4096 tokens", "messages[0].content is required"):
        assert not http_play.TELLING.search(message)


def test_what_takes_too_long_is_seen(healed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    healed.engine.script.token_delay_s = 0.05
    monkeypatch.setattr(http_play, "MAX_ANSWER_S", 0.1)
    with pytest.raises(BrokenPromise, match="took 0|no answer"):
        sent(healed, completion(b'{"prompt": "a"}'))


def inference_routes(document: dict[str, Any]) -> dict[str, Any]:
    """The part of the document that is for everybody, as it is where no key is wanted."""
    paths: dict[str, Any] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation.pop("security") == [{"key": ["inference"]}]:
                paths.setdefault(path, {})[method] = operation
    return document | {"paths": paths}


# Schemathesis warns of what Hypothesis will do, and its client of how it is called.
@pytest.mark.filterwarnings("ignore")
def test_requests_made_of_the_document() -> None:
    """What the document allows is answered as the document says; what it forbids, too."""
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    held = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]
    with target() as live:
        document = inference_routes(httpx.get(f"{live.url}/openapi.json").json())
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=live.url)
        num_operations = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            num_operations += 1
            # Without a body there is nothing that could be wrong.
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

                @settings(
                    max_examples=NUM_EXAMPLES,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case: schemathesis.Case) -> None:
                    response = case.call(timeout=http_play.MAX_ANSWER_S)
                    case.validate_response(response, checks=held)

                check()
        assert num_operations > 12
        check_good(live)
