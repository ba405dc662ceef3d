"""The default model's weights, held to transformers reading the same GGUF file."""

import pytest
import torch

from octavo.config import locate, read_model_config
from octavo.weights import read_tensors

pytestmark = pytest.mark.model


def test_weights_equal_those_of_transformers():
    from transformers import AutoModelForCausalLM  # slow to import

    checkpoint = locate("smollm2-135m-instruct")
    config = read_model_config(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).state_dict()
    del reference["lm_head.weight"]  # tied
    stream = read_tensors(checkpoint, config, dtype=torch.float32)
    assert set(stream.shapes) == set(reference)
    for name, tensor in stream:
        assert torch.equal(tensor, reference[name]), name
