"""Faults that a server must survive: a real process, and after each row the same golden tokens."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from faults.aftermath import unharmed
from faults.processes import PROMPT, Server, Stream, serving
from faults.refused import COMPLETIONS, REFUSED, Row, ask

pytestmark = pytest.mark.server


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_refused_requests_change_nothing(server: Server, row: Row) -> None:
    *_, status, code, param = row
    response = ask(server, row)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert not re.search(r"/\w+/", error["message"].replace("/v1/models", ""))  # no path


def test_F35_clients_that_leave_free_what_they_held(server: Server) -> None:
    """In the queue, in the prompt, in the answer, and among several answers."""
    aborted = server.metric('request_success_total{finished_reason="abort"}')
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 4}
    url = f"{server.url}{COMPLETIONS}"
    for _ in range(3):
        with server.client.stream("POST", url, json=body) as response:
            next(response.iter_text())
            with pytest.raises(httpx.TimeoutException):  # this one is in the queue
                server.client.post(url, json=body | {"stream": False}, timeout=0.1)
    server.until(server.is_at_rest)
    assert server.metric('request_success_total{finished_reason="abort"}') >= aborted + 12


def test_F37_F38_ten_times_as_many_as_may_come_are_served_in_time_or_refused(
    server: Server,
) -> None:
    """The queue is as short as it was told to be; nobody is left without an end."""
    fields = {"max_tokens": 60, "deadline_ms": 5000}
    deepest = 0.0
    with ThreadPoolExecutor(80) as pool:
        asked = [pool.submit(server.complete, **fields) for _ in range(60)]
        streams = [Stream(server, **fields) for _ in range(20)]
        while not all(answer.done() for answer in asked):
            deepest = max(deepest, server.metric("num_requests_waiting"))
    served = [answer.result() for answer in asked if answer.result().status_code == 200]
    refused = [answer.result() for answer in asked if answer.result().status_code != 200]
    for stream in streams:
        assert stream.join().status in (200, 503)
    told = [stream for stream in streams if stream.status == 200]
    assert len(served) + len(told) >= 8 and refused
    assert deepest <= 4
    for response in served:
        assert response.json()["usage"]["completion_tokens"] == 60
        assert response.elapsed.total_seconds() < 5  # the time that they gave
    assert all(stream.is_whole for stream in told)
    for response in refused:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1


def test_F39_a_deadline_that_passes_in_the_queue_ends_it_though_no_place_is_free(
    server: Server, fault: Path
) -> None:
    num_before = server.metric("prompt_tokens_total")
    fault.write_text("sleep 0.02")
    running = [Stream(server, max_tokens=100) for _ in range(4)]
    server.until(lambda: all(stream.text for stream in running))
    late = {"prompt": "Nobody has asked this before", "deadline_ms": 400}
    waiting = Stream(server, max_tokens=5, **late)
    response = server.complete(**late)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
    assert waiting.join().status == 504 and "deadline_exceeded" in waiting.text
    assert server.metric("num_requests_running") == 4  # all places were taken all the time
    fault.unlink()
    assert all(stream.join().is_whole for stream in running)
    assert server.metric("prompt_tokens_total") <= num_before + 4 * len(PROMPT)


def test_F39_who_has_begun_by_its_deadline_is_late_but_whole(server: Server, fault: Path) -> None:
    fault.write_text("sleep 0.05")
    stream = Stream(server, max_tokens=8, deadline_ms=100)
    assert stream.join().is_whole
    assert '"finish_reason":"length"' in stream.text


def test_F42_a_step_that_hangs_is_told_from_a_slow_one_and_shows_where(
    server: Server, fault: Path
) -> None:
    num_lines = len(server.err)
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
    log = "".join(server.err[num_lines:])
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


def test_F11_what_fits_the_models_context_and_never_the_pool_is_refused_at_once(
    model: Path, expected: list[int]
) -> None:
    """The context is as long as the pool, so that what is taken can run, whatever else does."""
    num_tokens = 128
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, fp32
    pool = ["--kv-cache-memory-bytes", str(num_tokens * token_bytes)]
    with serving(model, *pool) as server:
        fits = {"prompt": [1] * 28, "max_tokens": 100}

        def crowd() -> None:
            streams = [Stream(server, **fits, n=2) for _ in range(3)]
            assert all(stream.join().is_whole for stream in streams)

        crowd()  # once to be warm
        with unharmed(server, expected):
            num_preemptions = server.metric("num_preemptions_total")
            for stream in (False, True):
                response = server.complete(prompt=[1] * 28, max_tokens=101, stream=stream)
                assert response.status_code == 400, response.text
                error = response.json()["error"]
                assert error["code"] == "context_length_exceeded"
                assert "129" in error["message"] and "128" in error["message"]
            crowd()
            assert server.metric("num_preemptions_total") > num_preemptions  # they do not fit


def test_P9_a_failed_step_ends_its_requests_and_nobody_elses(server: Server, fault: Path) -> None:
    fault.write_text("raise an error in /secret/path.py")
    response = server.complete()
    fault.unlink()
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert "secret" not in response.text
    assert server.complete().status_code == 200


def test_F43_where_memory_runs_out_one_request_gives_way_and_the_others_lose_nothing(
    server: Server, fault: Path
) -> None:
    """The kernel raises torch's own error, in a step of requests that are well under way."""
    fields = {"max_tokens": 300, "temperature": 0}
    clean = Stream(server, **fields).join().said
    fault.write_text("sleep 0.004")  # so that all four are under way when it happens
    num_preemptions = server.metric("num_preemptions_total")
    streams = [Stream(server, **fields) for _ in range(4)]
    server.until(lambda: all(stream.text.count("data: {") > 5 for stream in streams))
    fault.write_text("oom")
    ended = [stream.join() for stream in streams]
    whole = [stream for stream in ended if stream.is_whole]
    [gave_way] = [stream for stream in ended if not stream.is_whole]
    assert (gave_way.error["type"], gave_way.error["code"]) == ("server_error", "out_of_memory")
    assert [stream.said for stream in whole] == [clean] * 3
    assert server.metric("num_preemptions_total") == num_preemptions + 4
    fault.write_text("oom")
    response = server.complete()  # alone: nobody else could have given way
    assert response.status_code == 503 and response.json()["error"]["code"] == "out_of_memory"
    assert int(response.headers["retry-after"]) >= 1
    assert "GiB" not in response.text


@pytest.mark.parametrize("kind", ["nan", "draw"], ids=["F44-not-finite", "F45-no-such-id"])
def test_a_row_that_fails_fails_alone(server: Server, fault: Path, kind: str) -> None:
    fields = {"max_tokens": 300, "temperature": 0}
    clean = Stream(server, **fields).join().said
    fault.write_text("sleep 0.004")  # so that all four are under way when it happens
    streams = [Stream(server, **fields) for _ in range(4)]
    server.until(lambda: all(stream.text.count("data: {") > 5 for stream in streams))
    fault.write_text(kind)
    ended = [stream.join() for stream in streams]
    [failed] = [stream for stream in ended if not stream.is_whole]
    assert (failed.error["type"], failed.error["code"]) == ("server_error", "numerical_error")
    assert [stream.said for stream in ended if stream.is_whole] == [clean] * 3
    fault.write_text(kind)
    response = server.complete()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "numerical_error"


def test_F49_the_wall_clock_may_jump(server: Server, fault: Path) -> None:
    fields = {"max_tokens": 100, "deadline_ms": 5000}
    streams = [Stream(server, **fields) for _ in range(4)]
    server.until(lambda: all(stream.text for stream in streams))
    fault.write_text("yesterday")
    assert server.complete(deadline_ms=5000).json()["created"] < time.time() - 80_000
    fault.unlink()
    assert server.complete(deadline_ms=5000).status_code == 200
    assert all(stream.join().is_whole for stream in streams)
