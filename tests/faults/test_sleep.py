"""Sleep of a real server: memory that others can use, and every way in which a night can end."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.conftest import golden
from faults.processes import Server, Stream, pause, serving

from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = pytest.mark.server

MIB = 2**20
KV_BYTES = 2**25
SHAPE: dict[str, int] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "vocab_size": 8000,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights and KV cache stand out from what a process holds anyway."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "large", **SHAPE)


@pytest.fixture(scope="module")
def sleeper(large: Path) -> Iterator[Server]:
    flags = ["--kv-cache-memory-bytes", str(KV_BYTES), "--watchdog-timeout-s", "2"]
    with serving(large, *flags) as server:
        yield server


def post(server: Server, path: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", timeout=30)


def told(server: Server, path: str) -> dict[str, Any]:
    """What a call brought that must succeed."""
    response = post(server, path)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def resident_bytes(server: Server) -> int:
    """Of the engine process, as the kernel says it."""
    status = Path(f"/proc/{server.engine.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def fill_kv_cache(server: Server) -> None:
    """Write to every block: untouched memory is not resident, and could not be given back."""
    prompts = [[(37 * i + n) % 250 for i in range(400)] for n in range(8)]
    assert server.complete(prompt=prompts, max_tokens=1).status_code == 200


@pytest.mark.parametrize("level", [1, 2])
def test_resident_memory_falls_and_the_golden_tokens_come_back(sleeper: Server, level: int) -> None:
    said, pid = golden(sleeper), sleeper.engine.pid
    # Twice: what the first sleep frees besides, an allocator's leftovers, is gone in the second.
    for _ in range(2):
        fill_kv_cache(sleeper)
        before = resident_bytes(sleeper)
        report = told(sleeper, f"/sleep?level={level}")["report"]
        fall = before - resident_bytes(sleeper)
        assert KV_BYTES - MIB < report["kv_cache_bytes"] <= fall
        assert (report["weight_bytes"] > 60 * MIB) == (level == 2)
        assert fall >= report["kv_cache_bytes"] + report["weight_bytes"]
        assert abs(fall - report["freed_bytes"]) < 8 * MIB
        assert sleeper.metric("sleep_level") == level
        assert sleeper.state == "sleeping" and sleeper.get("/health").status_code == 200
        told(sleeper, "/wake_up")
        assert golden(sleeper) == said
    sleeper.until(sleeper.is_at_rest)
    assert sleeper.engine.pid == pid and sleeper.state == "ok"
    assert "asleep at level" in "".join(sleeper.err)


def test_curl_puts_it_to_sleep_and_wakes_it(sleeper: Server) -> None:
    def curl(*words: str) -> dict[str, Any]:
        command = ["curl", "-s", "-f", *words[:-1], f"{sleeper.url}{words[-1]}"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=30)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    assert curl("-X", "POST", "/sleep?level=1")["phase"] == "asleep"
    assert curl("/is_sleeping")["is_sleeping"] is True
    assert curl("-X", "POST", "/wake_up")["phase"] == "awake"
    assert curl("/is_sleeping")["is_sleeping"] is False


def test_accepted_streams_end_first_and_others_are_told_to_come_again(sleeper: Server) -> None:
    streams = [Stream(sleeper, max_tokens=250) for _ in range(3)]
    sleeper.until(lambda: sleeper.metric("num_requests_running") == 3)
    falling = threading.Thread(target=told, args=(sleeper, "/sleep"))
    falling.start()
    sleeper.until(lambda: sleeper.get("/is_sleeping").json()["phase"] != "awake")
    late = sleeper.complete()
    assert late.status_code == 503 and late.json()["error"]["code"] == "sleeping"
    assert late.headers["retry-after"] == "5"
    for stream in streams:
        assert stream.join().text.count('"finish_reason":"length"') == 1
    falling.join()
    assert sleeper.get("/is_sleeping").json()["is_sleeping"]
    told(sleeper, "/wake_up")
    assert sleeper.complete().status_code == 200


def test_mode_abort_ends_every_stream_with_one_event(sleeper: Server) -> None:
    streams = [Stream(sleeper, max_tokens=450, n=2) for _ in range(3)]
    sleeper.until(lambda: sleeper.metric("num_requests_running") == 6)
    told(sleeper, "/sleep?mode=abort")
    for stream in streams:
        assert stream.join().error["code"] == "cancelled"
    told(sleeper, "/wake_up")
    sleeper.until(sleeper.is_at_rest)
    assert len(golden(sleeper)) == 8


def test_a_long_sleep_is_no_reproach(sleeper: Server) -> None:
    """Nor is an engine process that is stopped meanwhile: nobody waits for it."""
    told(sleeper, "/sleep")
    pause(sleeper.engine)
    end_s = time.monotonic() + 5  # the watchdog's time is 2 s
    while time.monotonic() < end_s:
        assert sleeper.state == "sleeping"
        time.sleep(0.2)
    sleeper.engine.send_signal(signal.SIGCONT)
    told(sleeper, "/wake_up")
    assert sleeper.state == "ok"
    assert "stuck" not in "".join(sleeper.err)


def test_weights_that_are_gone_cost_a_wake_up_and_no_more(large: Path, sleeper: Server) -> None:
    said = golden(sleeper)
    told(sleeper, "/sleep?level=2")
    weights, elsewhere = large / "model.safetensors", large / "elsewhere"
    weights.rename(elsewhere)
    failed = post(sleeper, "/wake_up")
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "wake_up_failed"
    assert str(large) not in failed.text
    assert sleeper.state == "sleeping"
    sleeper.until(lambda: "the engine cannot wake up" in "".join(sleeper.err))
    elsewhere.rename(weights)
    told(sleeper, "/wake_up")
    assert golden(sleeper) == said


def test_sigterm_while_it_sleeps_ends_it_cleanly(model: Path) -> None:
    with serving(model) as server:
        told(server, "/sleep?level=2")
        child = server.engine
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not child.is_running()


def test_an_engine_that_is_killed_in_its_sleep_is_told_as_ever(model: Path) -> None:
    with serving(model) as server:
        told(server, "/sleep")
        server.engine.kill()
        assert server.wait() == 1
        assert "killed by signal 9 (SIGKILL) while it slept, after step" in server.last_line
