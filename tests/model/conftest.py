"""The real model once, in transformers and in Octavo, both fp32."""

import pytest
import torch

from octavo import LLM
from octavo.config import DEFAULT_MODEL, locate


@pytest.fixture(scope="session")
def reference():
    """transformers' own reading of the same GGUF file."""
    from transformers import AutoModelForCausalLM

    path = locate(DEFAULT_MODEL).path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="session")
def llm():
    return LLM(DEFAULT_MODEL, dtype="float32", kv_cache_memory_bytes=2**29, check_integrity=True)
