"""Processes that play cases under a limit of time and of memory, and the parent that watches them.

A case that hangs, crashes or is killed takes its process with it; the next one goes on behind it.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1]
# Only a hang comes near it: the longest sound case takes two seconds, and machines are shared.
MAX_CASE_S = 15.0
MAX_START_S = 120.0
MAX_MORE_BYTES = 2**31  # of address space, beyond what the libraries take


@dataclass
class Report:
    """What became of a range of seeds."""

    num_cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)  # by seed


def replay(seed: int) -> str:
    """The line that plays one seed again."""
    return f"PYTHONPATH=tests {Path(sys.executable).name} -m fuzz --seed {seed}"


def fuzz(first: int, last: int, *, num_workers: int, progress: bool = False) -> Report:
    """Play the seeds from `first` to `last` - 1."""
    report, lock = Report(), threading.Lock()

    def watch(index: int) -> None:
        for seed, ended, what in _watch(first + index, last, num_workers):
            with lock:
                report.num_cases += 1
                report.outcomes[what.split(":")[0] if ended else "FAILED"] += 1
                if not ended:
                    report.failures[seed] = what
                    if progress:
                        print(f"seed {seed}: {what}\nreplay: {replay(seed)}\n", flush=True)
                if progress and report.num_cases % 2000 == 0:
                    print(f"{report.num_cases} cases, {len(report.failures)} failed", flush=True)

    with ThreadPoolExecutor(num_workers) as threads:
        list(threads.map(watch, range(num_workers)))
    return report


def _watch(first: int, last: int, step: int) -> Iterator[tuple[int, bool, str]]:
    """(seed, whether it ended well, how) for every `step`th seed, in a process after the other."""
    seed = first
    while seed < last:
        for ended, what in _one_worker(seed, last, step):
            yield seed, ended, what
            seed += step


def _one_worker(first: int, last: int, step: int) -> Iterator[tuple[bool, str]]:
    """What one process says of its seeds; the last one may be that it died."""
    command = [sys.executable, "-m", "fuzz", "--worker", str(first), str(last), str(step)]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as worker,
    ):
        assert worker.stdout is not None
        timer, hung = None, threading.Event()

        def kill() -> None:
            hung.set()
            worker.kill()

        num_left, is_ready = len(range(first, last, step)), False
        while True:
            timer = threading.Timer(MAX_START_S if timer is None else MAX_CASE_S, kill)
            timer.start()
            line = worker.stdout.readline()
            timer.cancel()
            if not line.endswith("\n"):
                break
            if not is_ready:
                is_ready = True
                continue
            num_left -= 1
            yield tuple(json.loads(line))
        status = worker.wait()
        if num_left:
            errors.seek(0)
            assert is_ready, f"sound checkpoints do not work:\n{errors.read()}"
            reason = f"ran for {MAX_CASE_S:g} s" if hung.is_set() else f"died with status {status}"
            yield False, f"{reason}\n{errors.read()[-2000:]}"


def work(first: int, last: int, step: int) -> None:
    """The worker's side: a line of JSON on stdout for every seed."""
    from fuzz.bases import bases
    from fuzz.cases import Case, draw_case
    from fuzz.play import BrokenPromise, play

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as folder:
        for base in bases():  # imports and allocates what every case needs, before the limit
            play(Case(base, base, {}), Path(folder) / "case")
        limit_memory()
        print("ready", file=out, flush=True)
        for seed in range(first, last, step):
            try:
                ended = True, play(draw_case(seed), Path(folder) / "case")
            except BrokenPromise as broken:
                ended = False, str(broken)
            print(json.dumps(ended), file=out, flush=True)


def limit_memory() -> None:
    """Let this process map 2 GiB more than it has now."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MAX_MORE_BYTES,) * 2)
