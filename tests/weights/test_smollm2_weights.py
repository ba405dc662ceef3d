"""The default model's weights, held to transformers reading the same GGUF file."""

import time

import pytest
import torch

from octavo.config import ModelConfig, locate
from octavo.weights import read_tensors

pytestmark = pytest.mark.model


def test_weights_equal_those_of_transformers():
    from transformers import AutoModelForCausalLM  # slow to import

    checkpoint = locate("smollm2-135m-instruct")
    config = ModelConfig.from_checkpoint(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).state_dict()
    del reference["lm_head.weight"]  # tied
    stream = read_tensors(checkpoint, config, dtype=torch.float32)
    assert set(stream.shapes) == set(reference)
    for name, tensor in stream:
        assert torch.equal(tensor, reference[name]), name


def test_weights_are_read_fast():
    checkpoint = locate("smollm2-135m-instruct")
    config = ModelConfig.from_checkpoint(checkpoint)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in read_tensors(checkpoint, config, dtype=torch.bfloat16):
            pass
        seconds.append(time.perf_counter() - start)
    # 0.2 s on two cores; the limit leaves room for a busy machine.
    assert min(seconds) < 1.5
