"""Whoever read our output may be gone when we end: that changes no status."""

import os
import subprocess
import sys

BROKEN = """
import os, sys
from octavo.cli import main

reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
os.close(writer)
try:
    print("what nobody reads", file=sys.stderr)
except BrokenPipeError:
    pass  # as logging does; the text waits for the next flush
sys.exit(main(["trace", "chat", "--out", sys.argv[1]]))
"""


def test_a_log_that_was_cut_changes_no_status(tmp_path):
    """Python ends with 120 where it cannot write out what is left."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", BROKEN, str(tmp_path / "trace.jsonl")]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
