"""From the start of a process to its engine's first token, with kernel caches cold or warm.

Every start is a process of its own (`octavo.bench.startup_child`). "Cold" means that no compiled
kernel is found: the caches of all compilers are put into an empty folder. The files of checkpoint
and Python packages are as warm as the operating system has them.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from octavo.config import option
from octavo.errors import ConfigError, OctavoError

# Where compilers keep what they made: Triton's kernels, ours in C++, inductor's, the driver's.
CACHE_VARIABLES = (
    "TRITON_CACHE_DIR",
    "OCTAVO_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
)
START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupSetup:
    """How often an engine is started. Its fields are flags."""

    num_iters_cold: int = option(1, "starts with an empty kernel cache each")
    num_iters_warm: int = option(
        3, "starts with the cache of the last cold one, or the user's own where there is none"
    )

    def __post_init__(self) -> None:
        if min(self.num_iters_cold, self.num_iters_warm) < 0:
            raise ConfigError("num_iters_cold and num_iters_warm must not be negative")
        if not self.num_iters_cold + self.num_iters_warm:
            raise ConfigError("num_iters_cold and num_iters_warm are both 0: nothing to measure")


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is to start."""

    model: str
    options: dict[str, Any]


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """What the process saw, in seconds of the clock that all processes of a machine share."""

    begun_s: float
    imported_s: float
    ready_s: float
    first_token_s: float
    phases: list[tuple[str, float]]  # of building the engine, with the time that each took


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start: seconds from the start of the process, and the phases that they are made of."""

    cache: str  # "cold" or "warm"
    ready_s: float
    first_token_s: float
    phases: list[tuple[str, float]]


def measure_startup(model: str, options: Mapping[str, Any], setup: StartupSetup) -> list[Start]:
    """Start the engine again and again, the cold ones first.

    Raises:
        OctavoError: a process failed; its last words are in the message.
    """
    order = Order(model=model, options=dict(options))
    starts = []
    environment: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="octavo-startup-") as folder:
        for index in range(setup.num_iters_cold):
            environment = {name: str(Path(folder) / str(index) / name) for name in CACHE_VARIABLES}
            starts.append(start_once(order, cache="cold", environment=environment))
        for _ in range(setup.num_iters_warm):
            starts.append(start_once(order, cache="warm", environment=environment))
    return starts


def start_once(order: Order, *, cache: str, environment: Mapping[str, str]) -> Start:
    """Start one process and time it."""
    spawned_s = time.monotonic()
    try:
        child = subprocess.run(
            [sys.executable, "-m", "octavo.bench.startup_child"],
            input=msgspec.json.encode(order),
            capture_output=True,
            timeout=START_TIMEOUT_S,
            env=os.environ | dict(environment),
        )
    except subprocess.TimeoutExpired as error:
        raise OctavoError(f"no first token after {START_TIMEOUT_S:.0f} s") from error
    if child.returncode:
        words = child.stderr.decode(errors="replace").strip()
        raise OctavoError(f"the engine did not start (code {child.returncode}): {words[-2000:]}")
    marks = msgspec.json.decode(child.stdout.splitlines()[-1], type=Marks)
    rest_s = marks.ready_s - marks.imported_s - sum(seconds for _, seconds in marks.phases)
    return Start(
        cache=cache,
        ready_s=marks.ready_s - spawned_s,
        first_token_s=marks.first_token_s - spawned_s,
        phases=[
            ("start Python", marks.begun_s - spawned_s),
            ("import torch", marks.imported_s - marks.begun_s),
            *marks.phases,
            ("rest of the build", rest_s),
            ("first token", marks.first_token_s - marks.ready_s),
        ],
    )
