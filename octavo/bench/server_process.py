"""`octavo serve` in a process of its own, for as long as a benchmark needs it.

Owns the process and its log. It listens on 127.0.0.1, at a port that the system chose.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from octavo.errors import OctavoError

LISTENING = re.compile(r"^Listening on (http://\S+)$", re.MULTILINE)
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.05
MAX_LOG_CHARS = 3000


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Engine options as command-line flags."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


@contextmanager
def running_server(model: str, options: Mapping[str, Any]) -> Iterator[str]:
    """The URL of a server that is ready, which ends with the block.

    Raises:
        OctavoError: it ended before it was ready, or was not ready in time.
    """
    command = [sys.executable, "-m", "octavo.cli", "serve", model]
    command += ["--host", "127.0.0.1", "--port", "0", *flags_of(options)]
    # A file and no pipe: nobody has to read along while the load runs.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _wait_until_ready(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: IO[str]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        code = process.poll()
        log.seek(0)
        text = log.read()
        if code is not None:
            raise OctavoError(f"the server ended with code {code}:\n{text[-MAX_LOG_CHARS:]}")
        if found := LISTENING.search(text):
            return found[1]
        time.sleep(POLL_S)
    raise OctavoError(f"the server is not ready after {START_TIMEOUT_S:.0f} s")
