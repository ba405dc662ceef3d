"""The life of a server: lifespan, drain, a second signal, a dead engine, texts that take long."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
from server.helpers import CONFIG, client_of, eventually

from octavo.errors import EngineDeadError, ModelNotFoundError
from octavo.server import OctavoServer, ServerConfig, create_app, serve
from octavo.testing.byte_tokenizer import ByteTokenizer
from octavo.testing.fake_engine import FakeEngine, FakeScript

CHILD = """
import socket, sys
from octavo.server import ServerConfig, create_app, serve
from octavo.testing.fake_engine import FakeEngine, FakeScript
config = ServerConfig(drain_timeout_s=int(sys.argv[2]))
engine = FakeEngine(FakeScript(token_delay_s=float(sys.argv[3])))
serve(create_app(engine, config), config, sockets=[socket.socket(fileno=int(sys.argv[1]))])
print("left in peace")
"""


@contextmanager
def child(drain_s: int, token_delay_s: float) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real server process on a socket that we bound, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        fd = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(fd), str(drain_s), str(token_delay_s)],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        yield process, url
    finally:
        process.kill()
        process.communicate()


def stream_and_signal(process: subprocess.Popen[bytes], url: str, num_signals: int) -> str:
    """What a stream holds in the end, whose server got SIGTERM after the first token."""
    body = {"prompt": "Hi", "max_tokens": 40, "ignore_eos": True, "stream": True}
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        for chunk in response.iter_text():
            if not text:
                for _ in range(num_signals):
                    os.kill(process.pid, signal.SIGTERM)
                    time.sleep(0.15)
            text += chunk
    return text


@pytest.mark.server
def test_f40_accepted_requests_finish() -> None:
    with child(drain_s=20, token_delay_s=0.01) as (process, url):
        text = stream_and_signal(process, url, 1)
        assert text.count('"text":') == 41
        assert text.endswith("data: [DONE]\n\n")
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (0, b"left in peace\n", b"")


@pytest.mark.server
def test_f40_drain_time_is_over() -> None:
    with child(drain_s=0, token_delay_s=1.0) as (process, url):
        text = stream_and_signal(process, url, 1)
        assert '"code":"draining"' in text
        assert text.endswith("data: [DONE]\n\n")
        process.communicate(timeout=10)
        assert process.returncode == 0


@pytest.mark.server
def test_f40_whole_answers_get_their_error_too() -> None:
    with child(drain_s=0, token_delay_s=30.0) as (process, url):
        killer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGTERM))
        killer.start()
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}, timeout=20)
        killer.join()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "draining"
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out) == (0, b"left in peace\n")
        assert b"Traceback" not in err


@pytest.mark.server
def test_f40_second_signal_is_immediate() -> None:
    with child(drain_s=60, token_delay_s=30.0) as (process, url):
        start = time.monotonic()
        text = stream_and_signal(process, url, 2)
        assert '"code":"draining"' in text
        assert text.endswith("data: [DONE]\n\n")
        process.communicate(timeout=10)
        assert time.monotonic() - start < 5
        assert process.returncode == 0


async def test_draining_server_takes_no_new_work() -> None:
    app = create_app(FakeEngine(), CONFIG)
    app.state.octavo.draining = True
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "draining"
        assert "retry-after" in response.headers
        metrics = await client.get("/metrics")
        assert metrics.status_code == 200
    counted = 'octavo_http_requests_total{code="503",route="/v1/completions"} 1.0'
    assert counted in metrics.text and "unmatched" not in metrics.text


def test_p10_dead_engine_ends_the_server() -> None:
    engine = FakeEngine(FakeScript(token_delay_s=0.01))
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    errors: list[EngineDeadError] = []

    def run() -> None:
        try:
            serve(create_app(engine, CONFIG), CONFIG, sockets=[listener])
        except EngineDeadError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    body = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
        text = ""
        for chunk in response.iter_text():
            text += chunk
            engine.script.dead = True
    assert '"code":"engine_dead"' in text and "/fake/path.py" not in text
    assert text.endswith("data: [DONE]\n\n")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_p10_an_engine_that_dies_while_the_server_drains() -> None:
    engine = FakeEngine(FakeScript(token_delay_s=0.01))
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = ServerConfig(drain_timeout_s=600)
    server = OctavoServer(create_app(engine, config), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    body = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
        text = ""
        for chunk in response.iter_text():
            if not text:
                server.handle_exit(signal.SIGTERM, None)
            text += chunk
            if len(text) > 2000:
                engine.script.dead = True
    assert '"code":"engine_dead"' in text
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert server.engine_error is not None


def test_lifespan_surrounds_serving() -> None:
    journal: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        journal.append("start")
        yield
        journal.append("stop")

    listener = socket.create_server(("127.0.0.1", 0))
    server = OctavoServer(create_app(FakeEngine(), CONFIG, lifespan=lifespan), CONFIG)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    eventually(lambda: server.started)
    assert journal == ["start"]
    server.should_exit = True
    thread.join(timeout=10)
    assert journal == ["start", "stop"]


def test_failed_start_raises_its_own_error(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        raise ModelNotFoundError("no such model")
        yield

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(FakeEngine(), CONFIG, lifespan=lifespan)
        with pytest.raises(ModelNotFoundError, match="no such model"):
            serve(app, CONFIG, sockets=[listener])
    assert "Traceback" not in caplog.text


@pytest.mark.server
def test_signal_while_starting() -> None:
    code = """
import asyncio, contextlib, socket
from octavo.server import ServerConfig, create_app, serve
from octavo.testing.fake_engine import FakeEngine

@contextlib.asynccontextmanager
async def lifespan():
    print("loading", flush=True)
    try:
        await asyncio.sleep(60)
        yield
    finally:
        print("stopped", flush=True)

config = ServerConfig(port=0)
serve(create_app(FakeEngine(), config, lifespan=lifespan), config)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, b"stopped\n", b"")


class SlowTokenizer(ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.3)
        return super().encode(text, add_special_tokens=add_special_tokens)


async def test_f10_long_texts_do_not_block_the_loop() -> None:
    engine = FakeEngine(max_model_len=20_000)
    engine.model = type(engine.model)("slow", 20_000, 258, SlowTokenizer())
    async with client_of(engine, ServerConfig()) as client:
        body = {"prompt": "a" * 10_000}
        long = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert (await client.get("/health")).status_code == 200
        assert time.monotonic() - start < 0.1
        assert (await long).status_code == 200
