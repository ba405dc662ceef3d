"""`octavo serve` as a process of its own, with a tiny random model: to be killed, stopped, drained.

A server is always ended with its `with` block, however the test ends.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 60.0

# What the tiny model says to this prompt does not change while the model does not.
PROMPT = "The quick brown fox"


class Server:
    """A server process, its engine process and its output so far.

    With `log_is_cut`, nobody reads its standard error, and whoever writes there is told so.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        log_is_cut: bool = False,
    ):
        self.headers = headers or {}  # of every request of ours
        self.client = httpx.Client(headers=self.headers, timeout=30)
        command = [sys.executable, "-m", "octavo.cli", "serve", str(model), "--port", "0"]
        small = ["--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", str(2**23)]
        self.process = subprocess.Popen(
            [*command, *small, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        if self.process.stdout is None or self.process.stderr is None:
            raise RuntimeError("pipes were asked for")
        if log_is_cut:
            self.process.stderr.close()
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self.out.extend, args=(self.process.stdout,)),
            *[threading.Thread(target=self.err.extend, args=(self.process.stderr,))]
            * (not log_is_cut),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def url(self) -> str:
        """Known once it listens."""
        found = re.search(r"Listening on (http://127\.0\.0\.1:\d+)", "".join(self.out))
        return found[1] if found else ""

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        """Wait for something to become true; says what the server said where it does not."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, "".join([*self.out, *self.err])
            time.sleep(0.02)

    def complete(self, **fields: Any) -> httpx.Response:
        """One completion, not streamed."""
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
        return self.client.post(f"{self.url}/v1/completions", json=body)

    def get(self, path: str) -> httpx.Response:
        """What a probe sees."""
        return self.client.get(f"{self.url}{path}", timeout=10)

    @property
    def state(self) -> str:
        """As it says itself, ready or not."""
        told: dict[str, Any] = self.get("/ready").json()
        return str(told.get("state", told))

    @property
    def last_line(self) -> str:
        """Of standard error."""
        return "".join(self.err).rstrip().splitlines()[-1]

    def metric(self, name: str) -> float:
        """One sample, by its name and labels as Prometheus writes them."""
        return self.metrics(name)[0]

    def metrics(self, *names: str) -> list[float]:
        """Several, of one moment."""
        text = self.get("/metrics").text
        found = [re.search(rf"^octavo_{re.escape(name)} (\S+)", text, re.M) for name in names]
        assert all(found), names
        return [float(sample[1]) for sample in found if sample]

    def is_at_rest(self) -> bool:
        """Nobody runs or waits, and all memory is free."""
        names = "kv_blocks", "kv_blocks_free", "num_requests_running", "num_requests_waiting"
        num_blocks, num_free, num_running, num_waiting = self.metrics(*names)
        return num_free == num_blocks and not (num_running or num_waiting)

    def wait(self, timeout_s: float = 20.0) -> int:
        """The exit status, with all output read."""
        status = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return status


@contextmanager
def serving(model: Path, *flags: str, **options: Any) -> Iterator[Server]:
    """A server that is ready; killed with its engine at the end, whatever came between."""
    with starting(model, *flags, **options) as server:
        server.until(lambda: server.url or server.process.poll() is not None, START_TIMEOUT_S)
        assert server.url, "".join([*server.out, *server.err])
        server.until(lambda: is_ready(server))
        yield server


def is_ready(server: Server) -> bool:
    """Whether it says so."""
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def starting(model: Path, *flags: str, **options: Any) -> Iterator[Server]:
    """A server that may still load."""
    server = Server(model, *flags, **options)
    try:
        yield server
    finally:
        family = []
        if server.process.poll() is None:
            family = psutil.Process(server.process.pid).children(recursive=True)
            server.process.kill()
        for child in family:
            if child.is_running():
                child.kill()
        server.client.close()
        server.wait()
        for pipe in (server.process.stdout, server.process.stderr):
            if pipe is not None:
                pipe.close()


class Stream:
    """One streamed completion in a thread of its own."""

    def __init__(self, server: Server, **fields: Any):
        self.text = ""
        self.status = 0  # none yet
        self.failure: Exception | None = None
        self._url, self._headers = f"{server.url}/v1/completions", server.headers
        fields = {"max_tokens": 450} | fields
        self._body = {"prompt": PROMPT, "ignore_eos": True, "stream": True} | fields
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            asking = httpx.stream(
                "POST", self._url, json=self._body, headers=self._headers, timeout=60
            )
            with asking as response:
                self.status = response.status_code
                for chunk in response.iter_text():
                    self.text += chunk
        except httpx.TransportError as error:
            self.failure = error

    def join(self, timeout_s: float = 30.0) -> "Stream":
        """Wait for its end."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), self.text[-200:]
        assert self.failure is None, self.failure
        return self

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end, and not with an error."""
        return self.text.endswith("data: [DONE]\n\n") and '"error"' not in self.text

    @property
    def said(self) -> str:
        """The text of all its pieces."""
        frames = re.findall(r"^data: (\{.*\})$", self.text, re.M)
        return "".join(c["text"] for frame in frames for c in json.loads(frame)["choices"])

    @property
    def error(self) -> dict[str, Any]:
        """The error event that ended it: the last but [DONE], and the only one."""
        *_, last, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), self.text[-300:]
        assert self.text.count('"error"') == 1
        error: dict[str, Any] = json.loads(last.removeprefix("data: "))["error"]
        return error


def pause(process: psutil.Process) -> None:
    """Stop a process without its leave."""
    process.send_signal(signal.SIGSTOP)
