"""Random two-layer Qwen3s from safetensors against transformers, and the ways to run them."""

import json

import pytest
from helpers import create_request, run_to_end, tokens_of
from parity import (
    answers_of,
    check_answers,
    check_planned_memory,
    create_llm,
    greedy,
    ids_of,
    load_reference,
    needs_native,
    prompts_of,
)

from octavo import SamplingParams
from octavo.config import EngineOptions
from octavo.engine import build_engine
from octavo.kernels import reference_only
from octavo.testing.tiny_qwen3 import TINY_QWEN3_CONFIG, write_tiny_qwen3

NUM_TOKENS = 40
GREEDY = greedy(NUM_TOKENS)
PROMPTS = prompts_of(1, 2, 15, 16, 17, 33, 100, 256)

VARIANTS = {
    "untied": {},
    # Random tied weights like to repeat the last token; with this seed they do not.
    "tied": {"tie_word_embeddings": True, "seed": 4},
    "heads of hidden over their number": {"head_dim": 16},
    "narrow heads": {"head_dim": 8},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": 6},
    "biased": {"attention_bias": True},
    "another eps": {"rms_norm_eps": 0.5},
    "transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
        "torch_dtype": None,
        "dtype": "float32",
        "layer_types": ["full_attention"] * 2,
    },
}


def tokens(llm, prompts=PROMPTS, sampling=GREEDY):
    return ids_of(llm, prompts, sampling)


def build(model, **options):
    defaults = {"device": "cpu", "kv_cache_memory_bytes": 2**24}
    return build_engine(EngineOptions.from_flat(str(model), defaults | options))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, variant):
    model = write_tiny_qwen3(tmp_path / "tiny", **variant)
    reference = load_reference(model)
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    check_answers(reference, PROMPTS, answers_of(create_llm(model), PROMPTS, GREEDY))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"block_size": 4, "async_scheduling": True},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, options):
    assert tokens(create_llm(model, **options)) == tokens(create_llm(model))


def test_preemption_does_not_change_the_text(model):
    block_bytes = 2 * 2 * 2 * 32 * 4 * 16
    tight = create_llm(model, kv_cache_memory_bytes=20 * block_bytes, max_model_len=300)
    assert tokens(tight) == tokens(create_llm(model))
    assert tight.stats().num_preemptions > 0


def test_the_references_give_the_same_text(model):
    with reference_only():
        references = create_llm(model)
    assert tokens(references) == tokens(create_llm(model))
    found = {str(report.choice) for report in references.engine.kernels}
    assert any(choice.startswith("qk_norm_rotary_kv_write: reference") for choice in found)


def test_an_answer_ends_at_either_end_token(tmp_path):
    """Qwen3 names one in its config and both in its generation config."""
    model = write_tiny_qwen3(tmp_path / "tiny", eos_token_id=257)
    answer = tokens(create_llm(model))[3]
    first = next(i for i, token in enumerate(answer) if i >= 3 and token not in answer[:i])
    ends = {"eos_token_id": [257, answer[first]]}
    (model / "generation_config.json").write_text(json.dumps(ends))
    llm = create_llm(model)
    for sampling in (SamplingParams(temperature=0, max_tokens=NUM_TOKENS), GREEDY):
        [output] = llm.generate([PROMPTS[3]], sampling, use_tqdm=False)
        stops = not sampling.ignore_eos
        assert output.outputs[0].finish_reason == ("stop" if stops else "length")
        assert len(output.outputs[0].token_ids) == (first + 1 if stops else NUM_TOKENS)


def test_a_config_alone_is_enough_for_random_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_QWEN3_CONFIG))
    engine = build(tmp_path, load_format="dummy")
    engine.core.add(create_request(20, 5, request_id="one"))
    assert len(tokens_of(run_to_end(engine.core), "one")) == 5


# One moment of the plan is Qwen3's own: between the two CPU kernels that its norm and rotation are.
MOMENTS = [
    (True, {"intermediate_size": 16, "num_key_value_heads": 1}, "norm of the heads"),
    (False, {"intermediate_size": 16}, "rotation in plain torch"),
]


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("compiled", "changes", "moment"), MOMENTS)
def test_memory_is_as_planned(tmp_path, dtype, compiled, changes, moment):
    model = write_tiny_qwen3(tmp_path / "tiny", **changes)
    engine = check_planned_memory(
        model, moment=moment, compiled=compiled, dtype=dtype, max_num_seqs=64
    )
    if compiled:
        weights = engine.memory.lines[0]
        assert weights.planned_bytes == weights.measured_bytes
