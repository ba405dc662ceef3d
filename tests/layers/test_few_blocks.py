"""A model with few of its blocks: for whoever asks which kernels run."""

import pytest
import torch

from octavo.config import model_config_from_hf
from octavo.kernels import AttentionBatch, reference_only
from octavo.layers import Build, StepContext, finish_layers, kv_specs
from octavo.models import create_model
from octavo.runner import allocate_kv_caches
from octavo.testing.tiny_llama import TINY_CONFIG
from octavo.weights import dummy_tensors, load_weights


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_first_and_the_last_block_run_and_the_model_stays_whole(num_layers):
    config = model_config_from_hf(TINY_CONFIG | {"num_hidden_layers": num_layers})
    with reference_only():
        model = create_model(config, Build("cpu", torch.float32), max_positions=64)
        load_weights(model.slots(), dummy_tensors(model.slots(), dtype=torch.float32))
        finish_layers(model)

    def layers_written_by(some_model):
        caches = allocate_kv_caches(
            kv_specs(some_model), num_blocks=1, block_size=16, dtype=torch.float32, device="cpu"
        )
        for cache in caches:
            cache.zero_()
        positions = torch.arange(10)
        starts = torch.tensor([0, 10], dtype=torch.int32)
        tables = torch.zeros(1, 1, dtype=torch.int32)
        attention = AttentionBatch(starts, starts[1:], tables, 10, 10)
        hidden = some_model(positions, StepContext(positions, positions, attention, caches))
        assert hidden.shape == (10, config.hidden_size)
        return [index for index, cache in enumerate(caches) if cache.any()]

    assert layers_written_by(model.with_few_blocks()) == sorted({0, num_layers - 1})
    assert layers_written_by(model) == list(range(num_layers))
