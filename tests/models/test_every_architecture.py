"""Each registered architecture as transformers has it: a tiny random model, in every mode.

A row that is added to the table is tested here at once, and fails until it has a tiny config.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, SamplingParams
from octavo.config import DeviceFacts, EngineOptions, architectures
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.config.plugins import EVERY_ARCHITECTURE
from octavo.engine import build_engine
from octavo.engine.memory_report import TOLERANCE, measure_largest_step
from octavo.errors import CheckpointError
from octavo.kernels import native
from octavo.testing.tiny_models import TINY_MODELS, write_tiny_model

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(n)]} for n in (1, 16, 17, 100)
]
NAMES = sorted(name for name in architectures() if name in TINY_MODELS)


def create_llm(model, **options):
    # Nothing here is large enough for two threads.
    defaults = {"kv_cache_memory_bytes": 2**22, "dtype": "float32", "num_threads": 1}
    return LLM(str(model), **(defaults | options), check_integrity=True)


def tokens(llm, prompts=PROMPTS):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


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
    return [o.outputs[0] for o in create_llm(model).generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(answers):
    return [answer.token_ids for answer in answers]


def test_every_architecture_has_a_tiny_config():
    """Unless another test holds it to transformers, as that of an encoder does."""
    tested_here = {
        name for name, one in architectures().items() if one.parity == EVERY_ARCHITECTURE
    }
    assert tested_here == set(TINY_MODELS)


@torch.inference_mode()
def test_tokens_and_likelihoods_are_those_of_transformers(tiny, answers):
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + answer.token_ids])
        logits = tiny[1](ids).logits[0, -NUM_TOKENS - 1 : -1].float()
        assert logits.argmax(-1).tolist() == answer.token_ids
        assert len(set(answer.token_ids)) > 3  # a model that repeats itself would prove little
        found = torch.tensor([step.logprob for step in answer.logprobs])
        likelihoods = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(found, likelihoods, rtol=1e-4, atol=1e-4)


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


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_as_planned(model, dtype):
    options = {"device": "cpu", "kv_cache_memory_bytes": 2**24, "dtype": dtype}
    options |= {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_threads": 1}
    measured = 0
    while not measured:  # torch's profiler now and then has no events at all of so short a step
        engine = build_engine(EngineOptions.from_flat(str(model), options))
        measured = measure_largest_step(engine.core, engine.config)
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    plan = plan_memory(engine.config, budget)
    assert plan.activation_bytes == pytest.approx(measured, rel=TOLERANCE)
    for line in engine.memory.lines:
        if line.measured_bytes is not None:
            assert line.planned_bytes == pytest.approx(line.measured_bytes, rel=TOLERANCE), line
