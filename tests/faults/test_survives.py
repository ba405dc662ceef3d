"""Faults that a server must survive: a real process, and after each row the same golden tokens."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.processes import PROMPT, Server, Stream

pytestmark = pytest.mark.server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def field(**fields: Any) -> bytes:
    """A completion with these fields; JSON, but with the numbers that JSON has not."""
    return json.dumps({"prompt": PROMPT, "max_tokens": 2} | fields).encode()


# id: (path, body, status, code, param)
REFUSED: dict[str, tuple[str, bytes, int, str | None, str | None]] = {
    "F01-truncated": (COMPLETIONS, b'{"prompt": "a"', 400, "invalid_json", None),
    "F02-too-large": (COMPLETIONS, field(user="x" * 2**24), 413, "request_too_large", None),
    "F05-deep": (COMPLETIONS, b'{"user": ' + b"[" * 10_000, 400, "invalid_json", None),
    "F05-digits": (COMPLETIONS, b'{"n": ' + b"9" * 1_000_000 + b"}", 400, None, "n"),
    "F06-no-prompt": (COMPLETIONS, b"{}", 400, None, "prompt"),
    "F06-null-content": (
        CHAT,
        b'{"messages": [{"role": "user", "content": null}]}',
        400,
        None,
        "messages[0].content",
    ),
    "F07-empty": (COMPLETIONS, field(prompt=[]), 400, None, "prompt"),
    "F08-unknown-model": (COMPLETIONS, field(model="gpt-9"), 404, "model_not_found", "model"),
    "F09-context": (
        COMPLETIONS,
        field(max_tokens=512),
        400,
        "context_length_exceeded",
        "max_tokens",
    ),
    "F10-long-text": (
        COMPLETIONS,
        field(prompt="a" * 2**23),
        400,
        "context_length_exceeded",
        "prompt",
    ),
    "F12-nan": (COMPLETIONS, field(temperature=float("nan")), 400, "invalid_json", None),
    "F12-huge": (COMPLETIONS, field(top_p=1e308), 400, None, "top_p"),
    "F13-n": (COMPLETIONS, field(n=10**9), 400, None, "n"),
    "F14-logprobs": (COMPLETIONS, field(logprobs=10**6), 400, None, "logprobs"),
    "F15-max-tokens": (COMPLETIONS, field(max_tokens=2**63), 400, None, "max_tokens"),
    "F16-vocabulary": (COMPLETIONS, field(prompt=[301]), 400, None, "prompt"),
    "F16-negative": (COMPLETIONS, field(prompt=[-1]), 400, None, "prompt"),
    "F18-stops": (COMPLETIONS, field(stop=["x"] * 10_000), 400, None, "stop"),
    "F19-bias": (COMPLETIONS, field(logit_bias={"301": 1}), 400, None, "logit_bias"),
    "F20-seed": (COMPLETIONS, field(seed=2**63), 400, None, "seed"),
    "F24-template": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}',
        400,
        None,
        "chat_template",
    ),
    "F32-embeddings": (COMPLETIONS, field(prompt_embeds="AAAA"), 400, None, "prompt_embeds"),
    "F34-no-such-route": ("/v1/nope", b"{}", 404, None, None),
    "F34-method": ("/v1/models", b"{}", 405, None, None),
}


def test_refused_requests_change_nothing(server: Server) -> None:
    """All of them one after the other, and then the checks that every row wants."""
    for name, (path, body, status, code, param) in REFUSED.items():
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=30)
        assert response.status_code == status, (name, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert error["type"] == "invalid_request_error", name
        assert param is None or error["param"] == param, (name, error)
        assert code is None or error["code"] == code, (name, error)
        assert "/" not in error["message"].replace("/v1/models", ""), name


def test_F35_clients_that_leave_free_what_they_held(server: Server) -> None:
    """In the queue, in the prompt, in the answer, and among several answers."""
    aborted = server.metric('request_success_total{finished_reason="abort"}')
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 4}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=30) as response:
            next(response.iter_text())
            with pytest.raises(httpx.TimeoutException):  # this one is in the queue
                httpx.post(f"{server.url}{COMPLETIONS}", json=body | {"stream": False}, timeout=0.1)
    server.until(server.is_at_rest)
    assert server.metric('request_success_total{finished_reason="abort"}') >= aborted + 12


def test_F37_F38_a_burst_is_served_or_refused_with_a_time_to_come_back(server: Server) -> None:
    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(lambda _: server.complete(max_tokens=60), range(80)))
    served = [r for r in responses if r.status_code == 200]
    refused = [r for r in responses if r.status_code != 200]
    assert len(served) >= 8 and refused
    for response in served:
        assert response.json()["usage"]["completion_tokens"] == 60
    for response in refused:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1


def test_F42_a_step_that_hangs_is_told_from_a_slow_one_and_shows_where(
    server: Server, fault: Path
) -> None:
    fault.write_text("hang")
    streams = [Stream(server, max_tokens=5) for _ in range(2)]
    server.until(lambda: server.state == "slow")
    assert server.get("/ready").status_code == 200
    server.until(lambda: server.state == "stuck")
    ready = server.get("/ready")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "stuck"
    assert server.get("/health").status_code == 200  # it may come back
    assert server.metric('engine_state{state="stuck"}') == 1
    assert server.metric('engine_state{state="ok"}') == 0
    fault.unlink()
    for stream in streams:
        assert stream.join().text.endswith("data: [DONE]\n\n")
    server.until(lambda: server.state == "ok")
    log = "".join(server.err)
    assert log.count("the engine is stuck") == 1
    assert "requests: cmpl-" in log and "; its process " in log
    assert 'plant.py", line' in log  # the stack of the step that hung


def test_requests_that_no_memory_is_given_to_are_starved(server: Server, fault: Path) -> None:
    fault.write_text("starve")
    streams = [Stream(server, max_tokens=5) for _ in range(2)]
    server.until(lambda: server.state == "starved")
    ready = server.get("/ready")
    assert ready.status_code == 200  # others may be no better
    assert "2 wait" in ready.json()["why"] and "by blocks" in ready.json()["why"]
    assert server.metric('engine_state{state="starved"}') == 1
    num_steps = server.metric("engine_steps_total")
    fault.unlink()
    for stream in streams:
        assert stream.join().text.endswith("data: [DONE]\n\n")
    assert num_steps < 60_000  # empty steps are not made as fast as can be


def test_F43_a_failed_step_ends_its_requests_and_nobody_elses(server: Server, fault: Path) -> None:
    fault.write_text("raise CUDA out of memory in /secret/path.py")
    response = server.complete()
    fault.unlink()
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert "secret" not in response.text
    assert server.complete().status_code == 200
