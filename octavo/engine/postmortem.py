"""Why an engine process ended, in one line for an operator: cause, phase, and a remedy where known.

Knows no engine: it is given the exit status or the last words.
"""

import os
import signal
from pathlib import Path

# What the kernel or a library says, in part, and what helps.
_REMEDIES = (
    (
        "out of memory",
        "lower --gpu-memory-utilization, --kv-cache-memory-bytes or --max-num-batched-tokens",
    ),
    ("no space left on device", "make room on the disk or in /dev/shm, or lower the offloading"),
    ("illegal memory access", "a kernel's bug: CUDA_LAUNCH_BLOCKING=1 names it; please report it"),
    ("device-side assert", "a kernel's bug: CUDA_LAUNCH_BLOCKING=1 names it; please report it"),
    ("too many open files", "raise `ulimit -n`"),
)
_SIGNAL_HINTS = {
    signal.SIGKILL: "the kernel's OOM killer? `dmesg` tells; lower --kv-cache-memory-bytes",
    signal.SIGBUS: "a file or shared memory that it had mapped is gone or full?",
    signal.SIGSEGV: "a crash in native code; its stack is above",
    signal.SIGABRT: "a library gave up; its words are above",
    signal.SIGTERM: "somebody ended it; send SIGTERM to the server instead",
}
_PROCESS_STATES = {
    "R": "computes",
    "S": "sleeps in a call",
    "D": "waits for a device or a disk, and cannot be interrupted",
    "T": "was stopped by a signal; SIGCONT lets it go on",
    "t": "is stopped by a debugger",
    "Z": "has ended",
}


def cause_of_exit(returncode: int, pid: int, phase: str) -> str:
    """What an exit status says. `phase`: what it did when it was last heard of."""
    if returncode >= 0:
        return f"the engine process {pid} ended with status {returncode} {phase}; see the log above"
    number = -returncode
    try:
        known = signal.Signals(number)
    except ValueError:
        return f"the engine process {pid} was killed by signal {number} {phase}"
    hint = _SIGNAL_HINTS.get(known)
    killed = f"the engine process {pid} was killed by signal {number} ({known.name}) {phase}"
    return killed if hint is None else f"{killed}: {hint}"


def cause_of_error(kind: str, message: str, phase: str) -> str:
    """What an exception says that ended the engine; its first line, for there is to be one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    named = first if kind == "EngineDeadError" else f"{kind}: {first}"
    remedy = next((help for sign, help in _REMEDIES if sign in message.lower()), None)
    said = f"the engine stopped {phase}: {named}"
    return said if remedy is None else f"{said}; {remedy}"


def process_state(pid: int) -> str:
    """What the kernel says that a process does now."""
    fields = _stat(pid)
    if not fields:
        return "is not to be seen"
    return _PROCESS_STATES.get(fields[0], f"is in state {fields[0]}")


def cpu_seconds(pid: int) -> float:
    """That all threads of a process used so far."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
