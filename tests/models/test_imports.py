"""What an engine loads at its start is what its model needs."""

import subprocess
import sys

import pytest

from octavo.testing.tiny_models import write_tiny_model

CODE = """
import sys
from octavo import LLM
LLM(sys.argv[1], load_format="dummy", kv_cache_memory_bytes=2**22, dtype="float32")
print(*sys.modules)
"""


@pytest.mark.parametrize(("architecture", "sees"), [("llama", False), ("llava", True)])
def test_a_model_of_text_loads_no_encoders_of_images(tmp_path, architecture, sees):
    write_tiny_model(tmp_path, architecture)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    loaded = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert "octavo.models.llama" in loaded
    assert ("octavo.vision.encoders" in loaded) is sees
    assert sees or "PIL" not in loaded
    assert "transformers" not in loaded
