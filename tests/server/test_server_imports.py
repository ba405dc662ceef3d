"""The front-end process stays light: no torch, no transformers."""

import subprocess
import sys

CODE = """
import sys
import octavo.server, octavo.testing.fake_engine
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_no_torch() -> None:
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout
    assert printed == b"[]\n"
