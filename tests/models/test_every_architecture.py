"""Each registered architecture as transformers has it: a tiny random model, in every mode.

A row that is added to the table is tested here at once, and fails until it has a tiny config.
"""

import re

import parity
import pytest
import torch
from parity import (
    answers_of,
    check_answers,
    check_planned_memory,
    greedy,
    ids_of,
    needs_native,
    prompts_of,
)
from safetensors.torch import load_file, save_file

from octavo.config import architectures
from octavo.config.plugins import EVERY_ARCHITECTURE
from octavo.errors import CheckpointError
from octavo.testing.tiny_models import TINY_MODELS, write_tiny_model

NUM_TOKENS = 24
GREEDY = greedy(NUM_TOKENS, logprobs=1)
PROMPTS = prompts_of(1, 16, 17, 100)
NAMES = sorted(name for name in architectures() if name in TINY_MODELS)


def create_llm(model, **options):
    # Nothing here is large enough for two threads.
    return parity.create_llm(model, **({"dtype": "float32", "num_threads": 1} | options))


def tokens(llm, prompts=PROMPTS):
    return ids_of(llm, prompts, GREEDY)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request, tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / request.param
    return directory, write_tiny_model(directory, request.param)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
def answers(model):
    """Of the engine as it is by default: all prompts together, none of them cut."""
    return answers_of(create_llm(model), PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def expected(answers):
    return [answer.token_ids for answer in answers]


def test_every_architecture_has_a_tiny_config():
    """Unless another test holds it to transformers, as that of an encoder does."""
    tested_here = {
        name for name, one in architectures().items() if one.parity == EVERY_ARCHITECTURE
    }
    assert tested_here == set(TINY_MODELS)


def test_tokens_and_likelihoods_are_those_of_transformers(tiny, answers):
    check_answers(tiny[1], PROMPTS, answers)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "async_scheduling": True},
        {"block_size": 4, "max_num_batched_tokens": 50},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, expected, options):
    assert tokens(create_llm(model, **options)) == expected


def test_a_prefix_hit_does_not_change_the_text(model, expected):
    llm = create_llm(model)
    tokens(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert outputs[-1].num_cached_tokens == 96


def test_preemption_does_not_change_the_text(model):
    crowd = [{"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(15)]} for n in range(1, 9)]
    roomy = create_llm(model)
    # All of them start, in a block each, and each of them is to grow into a third one.
    tight_bytes = 12 * roomy.engine.config.kv_block_bytes
    tight = create_llm(model, kv_cache_memory_bytes=tight_bytes, max_model_len=64)
    assert tokens(tight, crowd) == tokens(roomy, crowd)
    assert tight.stats().num_preemptions > roomy.stats().num_preemptions


def test_bfloat16_loads_and_runs(model):
    answers = tokens(create_llm(model, dtype="bfloat16"))
    assert [len(answer) for answer in answers] == [NUM_TOKENS] * len(PROMPTS)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "has shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_tensors_name(model, tmp_path, damage):
    tensors = load_file(model / "model.safetensors")
    # Of a block: every architecture has them, and none is optional.
    name = next(name for name in sorted(tensors) if ".0." in name and tensors[name].dim() == 2)
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors[name := f"{name}.extra"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    for file in model.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=damage) as caught:
        create_llm(tmp_path)
    assert re.search(re.escape(name), str(caught.value))


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_as_planned(model, dtype):
    check_planned_memory(model, dtype=dtype, max_num_seqs=32, num_threads=1)
