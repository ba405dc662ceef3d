"""What is said of an engine that ended: one line, with the cause and what helps."""

import os
import subprocess
import sys

import pytest

from octavo.engine.postmortem import cause_of_error, cause_of_exit, cpu_seconds, process_state


@pytest.mark.parametrize(
    ("returncode", "expected"),
    [
        (-9, "killed by signal 9 (SIGKILL) in step 3: the kernel's OOM killer?"),
        (-11, "killed by signal 11 (SIGSEGV) in step 3: a crash in native code"),
        (-10, "killed by signal 10 (SIGUSR1) in step 3"),
        (-64, "killed by signal 64"),
        (1, "the engine process 7 ended with status 1 in step 3"),
        (0, "ended with status 0"),
    ],
)
def test_exit_statuses(returncode, expected):
    assert expected in cause_of_exit(returncode, 7, "in step 3")


def test_an_error_of_many_lines_is_one_line_with_its_remedy():
    said = cause_of_error("OutOfMemoryError", "\nCUDA out of memory.\nTried to ...", "in step 3")
    assert said.startswith("the engine stopped in step 3: OutOfMemoryError: CUDA out of memory.; ")
    assert "--gpu-memory-utilization" in said and "\n" not in said
    said = cause_of_error("EngineDeadError", "2 steps in a row failed", "in step 3")
    assert said == "the engine stopped in step 3: 2 steps in a row failed"
    assert cause_of_error("KeyError", " \n", "at rest") == (
        "the engine stopped at rest: KeyError: no message"
    )


def test_processes_are_seen_from_outside():
    code = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            while cpu_seconds(process.pid) < 0.05:
                assert process.poll() is None
            assert process_state(process.pid) == "computes"
        finally:
            process.kill()
    assert process_state(process.pid) == "is not to be seen"
    assert cpu_seconds(process.pid) == 0
    assert cpu_seconds(os.getpid()) > 0
