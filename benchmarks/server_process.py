"""`octavo serve` with a tiny random model as a process of its own, for benchmarks of the server.

It listens on 127.0.0.1 alone, and is ended with its `with` block, whatever came between.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from octavo.testing.tiny_llama import write_tiny_llama

START_TIMEOUT_S = 120.0


class Server:
    """The front-end process and, below it, the engine. Its output goes to two files."""

    def __init__(self, process: "subprocess.Popen[bytes]", directory: Path):
        self.process = process
        self.front = psutil.Process(process.pid)
        self._directory = directory
        self.port = 0

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self._directory / "out").read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self._directory / "err").read_text()

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        [child] = self.front.children()
        return child

    def wait_until_ready(self) -> None:
        """Until it says where it listens."""
        end_s = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"Listening on http://127\.0\.0\.1:(\d+)", self.out)):
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"the server did not start:\n{self.out}{self.err}")
            time.sleep(0.05)
        self.port = int(found[1])

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each process has used."""
        found = {"front end": self.front, "engine": self.engine}
        return {name: sum(process.cpu_times()[:2]) for name, process in found.items()}

    def rss_mib(self) -> dict[str, float]:
        """Memory in RAM of each process."""
        found = {"front end": self.front, "engine": self.engine}
        return {name: process.memory_info().rss / 2**20 for name, process in found.items()}

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        """Status and text; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name: str) -> float:
        """One sample, by its name without our prefix."""
        found = re.search(rf"^octavo_{name} (\S+)", self.get("/metrics")[1], re.M)
        if found is None:
            raise RuntimeError(f"no metric octavo_{name}")
        return float(found[1])

    def is_at_rest(self) -> bool:
        """Nobody runs or waits, and all blocks are free."""
        busy = self.metric("num_requests_running") + self.metric("num_requests_waiting")
        return not busy and self.metric("kv_blocks_free") == self.metric("kv_blocks")

    def golden(self) -> list[int]:
        """What the model says to a known prompt."""
        body = {"prompt": "The quick brown fox", "max_tokens": 16, "temperature": 0}
        data = json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            ids: list[int] = json.load(response)["choices"][0]["token_ids"]
        return ids


def write_model(directory: Path, **changes: Any) -> Path:
    """A tiny random model that one core computes in no time."""
    return write_tiny_llama(directory / "tiny", max_position_embeddings=4096, **changes)


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> float:
    """Wait for something to become true; returns how long that took."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > timeout_s:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.01)
    return time.monotonic() - start_s


@contextmanager
def serving(
    model: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    stderr: IO[bytes] | None = None,
    kv_bytes: int = 2**28,
) -> Iterator[Server]:
    """A server that is ready; `stderr` may be a file of the caller's."""
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as name:
        directory = Path(name)
        with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
            process = subprocess.Popen(
                command_of(model, "--port", "0", *flags, kv_bytes=kv_bytes),
                stdout=out,
                stderr=stderr or err,
                env=(os.environ if environment is None else environment) | {"OMP_NUM_THREADS": "1"},
            )
        server = Server(process, directory)
        try:
            server.wait_until_ready()
            yield server
        finally:
            end(process)


def command_of(model: Path, *flags: str, kv_bytes: int = 2**28) -> list[str]:
    """The command that serves a tiny model on one core."""
    command = [sys.executable, "-m", "octavo.cli", "serve", str(model)]
    small = ["--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", str(kv_bytes)]
    return [*command, *small, *flags]


def start_and_wait(model: Path, *flags: str) -> tuple[int, str]:
    """Exit status and standard error of a server that cannot start."""
    command = command_of(model, *flags)
    run = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    return run.returncode, run.stderr


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a server and its engine, where they are still there."""
    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
