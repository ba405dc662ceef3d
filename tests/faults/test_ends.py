"""Faults that end a server: what its streams, its probes, its exit status and its last line say."""

import json
import shutil
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest
from faults import plant
from faults.processes import PROMPT, Server, Stream, pause, serving, starting

pytestmark = pytest.mark.server


def until_all_began(server: Server, streams: list[Stream]) -> None:
    server.until(lambda: all(stream.text for stream in streams))


def test_F40_a_drain_finishes_what_was_accepted_and_F48_without_a_log(model: Path) -> None:
    """Nobody reads its log any more, either: that costs the log, and nothing else."""
    with serving(model, "--log-requests", log_is_cut=True) as server:
        # A connection from before, as a probe's or a balancer's.
        with httpx.Client(base_url=server.url, timeout=10) as probe:
            assert probe.get("/ready").json()["state"] == "ok"
            usage = {"include_usage": True}
            streams = [Stream(server, max_tokens=450, stream_options=usage) for _ in range(6)]
            until_all_began(server, streams)
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: server.get("/ready").status_code == 503)
            ready = probe.get("/ready")
            assert ready.json()["error"]["code"] == ready.json()["state"] == "draining"
            assert probe.get("/health").status_code == 200
            late = probe.post("/v1/completions", json={"prompt": PROMPT})
            assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
            assert int(late.headers["retry-after"]) >= 1
            assert server.process.poll() is None
        for stream in streams:
            assert '"completion_tokens":450' in stream.join().text
            assert '"finish_reason":"length"' in stream.text
            assert stream.text.endswith("data: [DONE]\n\n")
        assert server.wait() == 0


def test_F41_a_killed_engine_ends_streams_health_and_server(model: Path) -> None:
    with serving(model) as server:
        streams = [Stream(server) for _ in range(3)]
        until_all_began(server, streams)
        killed_s = time.monotonic()
        server.engine.kill()
        red_s = until_red(server) - killed_s
        for stream in streams:
            assert stream.join().error["code"] == "engine_dead"
        assert server.wait() == 1
        assert red_s < 5
        assert "killed by signal 9 (SIGKILL) in step" in server.last_line
        assert "lower --kv-cache-memory-bytes" in server.last_line


def until_red(server: Server) -> float:
    """When liveness fails: it says so, or nobody answers any more."""
    url = f"{server.url}/health"

    def is_red() -> bool:
        try:
            return httpx.get(url, timeout=5).status_code == 503
        except httpx.TransportError:
            return True

    server.until(is_red)
    return time.monotonic()


def test_F41_an_engine_that_is_killed_while_it_loads(model: Path) -> None:
    with starting(model) as server:
        process = psutil.Process(server.process.pid)
        server.until(lambda: process.children() and listeners(process))
        url = f"http://127.0.0.1:{listeners(process)[0]}"
        pause(server.engine)  # it loads for as long as we like
        ready = httpx.get(f"{url}/ready", timeout=10)
        assert (ready.status_code, ready.json()["state"]) == (503, "loading")
        assert ready.json()["error"]["code"] == "loading" and "retry-after" in ready.headers
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        assert httpx.get(f"{url}/v2/health/live", timeout=10).status_code == 200
        late = httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT}, timeout=10)
        assert late.status_code == 503
        assert server.url == ""
        server.engine.kill()
        assert server.wait() == 1
        assert "killed by signal 9 (SIGKILL)" in server.last_line
        assert "load" in server.last_line


def listeners(process: psutil.Process) -> list[int]:
    """Ports that a process listens on."""
    return [c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN]


def test_F42_a_stopped_engine_is_noticed_though_nobody_waits_and_is_given_up(model: Path) -> None:
    with serving(model, "--watchdog-timeout-s", "2") as server:
        pause(server.engine)
        body = {"prompt": PROMPT, "max_tokens": 5}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
        server.until(lambda: server.state == "stuck")
        assert server.get("/health").status_code == 200
        assert '"code":"engine_dead"' in Stream(server, max_tokens=5).join().text
        assert server.wait() == 1
        assert "the engine was given up: no step finished for" in server.last_line
        assert "was stopped by a signal" in server.last_line
        assert "--watchdog-timeout-s" in server.last_line


def test_P10_two_failed_steps_end_the_server_and_the_log_is_json(
    model: Path, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    flags = ["--log-format", "json", "--log-requests"]
    with serving(model, *flags, environment=plant.environment(tmp_path, fault)) as server:
        headers = {"x-request-id": "mine"}
        body = {"prompt": "a secret of mine", "max_tokens": 3}
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200
        fault.write_text("raise CUDA out of memory.\nTried to allocate 2 GiB")
        first = server.complete()
        assert first.status_code == 500
        second = server.complete(stream=False)
        assert second.status_code == 503 and second.json()["error"]["code"] == "engine_dead"
        assert server.wait() == 1
        lines = [json.loads(line) for line in "".join(server.err).splitlines()]
    for line in lines:
        assert line["time"].endswith("Z") and line["logger"] and line["message"]
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
    assert "a secret of mine" not in json.dumps(lines)
    last = lines[-1]
    assert last["level"] == "critical"
    assert (
        "2 steps in a row failed, the last with RuntimeError: CUDA out of memory"
        in (last["message"])
    )
    assert "lower --gpu-memory-utilization" in last["message"] and "\n" not in last["message"]
    [access] = [li for li in lines if li.get("request_id") == "mine" and "status" in li]
    assert (access["method"], access["route"]) == ("POST", "/v1/completions")
    assert access["status"] == 200 and 0 < access["duration_s"] < 30
    assert access["num_prompt_tokens"] == 16 and access["num_output_tokens"] <= 3
    assert [li for li in lines if li["logger"].startswith("octavo.engine") and "exception" in li]


def test_F46_a_damaged_checkpoint_ends_the_start_with_its_name(model: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with starting(damaged) as server:
        assert server.wait() == 1
        assert server.url == "" and "model.safetensors" in server.last_line


def test_F47_a_config_that_brings_code_is_refused_and_nothing_runs(
    model: Path, tmp_path: Path
) -> None:
    evil = Path(shutil.copytree(model, tmp_path / "evil"))
    config = json.loads((evil / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config"}, "num_hidden_layers": 10**9}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with starting(evil) as server:
        assert server.wait() == 1
        assert server.url == "" and "num_hidden_layers" in server.last_line
    assert not (tmp_path / "ran").exists()
