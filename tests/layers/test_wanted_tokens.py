"""Only the hidden states that somebody asks for are computed to the end; they do not change."""

import pytest
import torch

from octavo.config import model_config_from_hf
from octavo.kernels import AttentionBatch, reference_only
from octavo.layers import Build, StepContext, finish_layers, kv_specs
from octavo.models import create_model
from octavo.runner import allocate_kv_caches
from octavo.testing.tiny_llama import TINY_CONFIG
from octavo.weights import dummy_tensors, load_weights


@pytest.mark.parametrize("wanted", [[], [0], [7, 3], [9, 9, 0], list(range(10))], ids=str)
def test_a_wanted_token_has_the_hidden_state_that_it_has_among_all(wanted):
    config = model_config_from_hf(TINY_CONFIG)
    with reference_only():
        model = create_model(config, Build("cpu", torch.float32), max_positions=64)
        load_weights(model.slots(), dummy_tensors(model.slots(), dtype=torch.float32))
        finish_layers(model)

    def hidden(index):
        caches = allocate_kv_caches(
            kv_specs(model), num_blocks=2, block_size=16, dtype=torch.float32, device="cpu"
        )
        positions = torch.arange(10)
        starts = torch.tensor([0, 10], dtype=torch.int32)
        tables = torch.zeros(1, 1, dtype=torch.int32)
        attention = AttentionBatch(starts, starts[1:], tables, 10, 10)
        context = StepContext(positions, positions, attention, caches, wanted=index)
        return model(positions * 7, context)

    some = hidden(torch.tensor(wanted, dtype=torch.int32))
    torch.testing.assert_close(some, hidden(None)[wanted], rtol=1e-5, atol=1e-5)
