"""Random two-layer Llamas from safetensors against transformers, in every mode of the engine."""

import pytest
from parity import answers_of, check_answers, create_llm, greedy, ids_of, load_reference, prompts_of

from octavo import SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

NUM_TOKENS = 40
GREEDY = greedy(NUM_TOKENS)
PROMPTS = prompts_of(1, 2, 15, 16, 17, 33, 100, 256)

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": 6},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def tokens(llm, prompts=PROMPTS, sampling=GREEDY):
    return ids_of(llm, prompts, sampling)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, variant):
    model = write_tiny_llama(tmp_path / "tiny", **variant)
    reference = load_reference(model)
    check_answers(reference, PROMPTS, answers_of(create_llm(model), PROMPTS, GREEDY))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"block_size": 4},
        {"async_scheduling": True},
        {"async_scheduling": True, "max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"batching": "static"},
        {"batching": "continuous", "max_num_seqs": 3},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, options):
    assert tokens(create_llm(model, **options)) == tokens(create_llm(model))


def test_preemption_does_not_change_the_text(model):
    block_bytes = 2 * 2 * 2 * 16 * 4 * 16
    tight = create_llm(model, kv_cache_memory_bytes=20 * block_bytes, max_model_len=300)
    assert tokens(tight) == tokens(create_llm(model))
    assert tight.stats().num_preemptions > 0


def test_a_warm_prefix_cache_does_not_change_the_text(model):
    cold = create_llm(model, enable_prefix_caching=False)
    llm = create_llm(model)
    expected = tokens(cold)
    assert tokens(llm) == expected
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert [o.num_cached_tokens for o in outputs] == [0, 0, 0, 0, 16, 32, 96, 240]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seeds_give_the_same_text_whatever_else_is_in_the_batch(model, dtype):
    llm = create_llm(model, dtype=dtype)
    sampling = [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=i, max_tokens=NUM_TOKENS)
        for i in range(len(PROMPTS))
    ]
    together = tokens(llm, PROMPTS, sampling)
    alone = [
        tokens(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, sampling, strict=True)
    ]
    assert together == alone


def test_n_answers_differ_and_the_first_is_that_of_n_1(model):
    llm = create_llm(model)
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    one = llm.generate(PROMPTS[3], SamplingParams(**params), use_tqdm=False)[0].outputs
    four = llm.generate(PROMPTS[3], SamplingParams(n=4, **params), use_tqdm=False)[0].outputs
    assert [answer.index for answer in four] == [0, 1, 2, 3]
    assert four[0].token_ids == one[0].token_ids
    assert len({tuple(answer.token_ids) for answer in four}) == 4
