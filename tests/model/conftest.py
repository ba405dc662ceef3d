"""The real model once, in transformers and in Octavo, both fp32."""

import json

import pytest
import torch
from safetensors.torch import save_file

from octavo import LLM
from octavo.config import DEFAULT_MODEL, locate, read_model_config
from octavo.weights import read_tensors


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """transformers' model on the same weights, as plain tensors.

    tests/weights holds each of these tensors, bit for bit, to transformers' own reading of the GGUF
    file; reading it here again would take half a minute.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = locate(DEFAULT_MODEL)
    config = read_model_config(checkpoint)
    directory = tmp_path_factory.mktemp("plain")
    tensors = dict(read_tensors(checkpoint, config, dtype=torch.float32))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(checkpoint.config()))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="session")
def llm():
    return LLM(DEFAULT_MODEL, dtype="float32", kv_cache_memory_bytes=2**29, check_integrity=True)
