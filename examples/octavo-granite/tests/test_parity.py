"""Granite as transformers has it: a tiny random model, in every way that an engine runs it."""

import pytest
from octavo.config import architectures
from octavo.testing.parity import CHECKS, Parity, write_checkpoint
from octavo.testing.tiny_models import TINY_MODELS

from octavo_granite import ARCHITECTURE

# transformers' class that computes the same, and its config.
MODEL_TYPE = "granite"
PLAIN = TINY_MODELS["llama"] | {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
VARIANTS = {
    "plain": PLAIN,
    # A tied model whose blocks add little repeats its prompt: here its embeddings are smaller.
    "biases, one matrix at both ends": PLAIN
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    | {"embedding_multiplier": 0.4},
    "one head of keys": PLAIN | {"num_key_value_heads": 1, "rms_norm_eps": 0.01},
    "no multipliers": TINY_MODELS["llama"] | {"attention_multiplier": 16**-0.5},
}


@pytest.fixture(scope="module", params=VARIANTS)
def parity(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    fields = VARIANTS[request.param]
    reference = write_checkpoint(directory, MODEL_TYPE, fields, hf_name=ARCHITECTURE.hf_name)
    return Parity(directory, reference)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_answers_as_transformers_does(parity, check):
    check(parity)


def test_it_is_installed():
    assert architectures()["granite"].package == "octavo-granite"
