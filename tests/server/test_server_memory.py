"""Memory of large bodies goes back to the system, in a process of its own: the setting stays."""

import ctypes
import subprocess
import sys

import pytest

MIB = 2**20

# A first body is larger than those that come later, and something small outlives them all.
PLAY = f"""
import os
from octavo.server.memory import return_large_blocks

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def play():
    body = b"x" * {16 * MIB}
    del body
    bodies = [b"x" * {MIB} for _ in range(8)]
    outlives = b"x" * 4096
    del bodies
    return outlives

if {{wanted}}:
    assert return_large_blocks()
kept = play()
before = resident_bytes()
kept = [kept, *(play() for _ in range(3))]
print(resident_bytes() - before, resident_bytes())
"""


def play(*, wanted: bool) -> list[int]:
    """How much a process grew with bodies after the first ones, and how large it then was."""
    command = [sys.executable, "-c", PLAY.replace("{wanted}", str(wanted))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_what_large_bodies_took_is_returned_when_they_are_freed() -> None:
    grown_bytes, size_bytes = play(wanted=True)
    _, size_without_bytes = play(wanted=False)
    assert grown_bytes < MIB
    assert size_bytes + 4 * MIB < size_without_bytes  # else the C library does so by itself by now
