"""Prompt log-probabilities against transformers' full forward pass, in every mode of the engine."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import RequestError
from octavo.testing.tiny_llama import write_tiny_llama

PROMPTS = [[(31 * i + 7 * n) % 301 for i in range(n)] for n in (1, 2, 15, 16, 17, 33, 100, 256)]
SCORED = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=3)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    """For each prompt the log-softmax [n - 1, V] that its tokens after the first are drawn from."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return [reference(torch.tensor([p])).logits[0, :-1].log_softmax(-1) for p in PROMPTS]


def create_llm(model, **options):
    return LLM(str(model), **({"kv_cache_memory_bytes": 2**24} | options), check_integrity=True)


def generate(llm, prompts, sampling=SCORED):
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(prompts, sampling, use_tqdm=False)


def check(outputs, expected, num_top=3):
    for output, logprobs in zip(outputs, expected, strict=True):
        first, *scores = output.prompt_logprobs
        assert first is None
        assert len(scores) == len(logprobs) == len(output.prompt_token_ids) - 1
        for token_id, score, row in zip(output.prompt_token_ids[1:], scores, logprobs, strict=True):
            assert score.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            assert score.rank == int((row > row[token_id]).sum()) + 1
            values, ids = row.topk(num_top)
            assert [token for token, _ in score.top] == ids.tolist()
            assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"async_scheduling": True, "max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"batching": "static"},
        {"kv_allocator": "contiguous-buddy", "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(model, expected, options):
    check(generate(create_llm(model, **options), PROMPTS), expected)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_reports_nothing_twice(model, expected, mode, asynchronous):
    host = {"kv_offloading_size": 0.01} if mode == "swap" else {}
    llm = create_llm(
        model,
        kv_cache_memory_bytes=20 * BLOCK_BYTES,
        max_model_len=300,
        max_num_batched_tokens=40,
        preemption_mode=mode,
        async_scheduling=asynchronous,
        **host,
    )
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=3)
    order = [5, 6, 6, 5, 4, 7]
    outputs = generate(llm, [PROMPTS[i] for i in order], sampling)
    assert llm.stats().num_preemptions > 0
    check(outputs, [expected[i] for i in order])


def test_a_warm_cache_is_filled_and_not_read(model, expected):
    llm = create_llm(model)
    for _ in range(2):
        outputs = generate(llm, PROMPTS)
        check(outputs, expected)
        assert [output.num_cached_tokens for output in outputs] == [0] * len(PROMPTS)
    plain = SamplingParams(temperature=0, max_tokens=1)
    assert generate(llm, PROMPTS[-1:], plain)[0].num_cached_tokens == 240


def test_what_others_want_changes_no_score(model, expected):
    llm = create_llm(model, max_num_batched_tokens=64)
    penalties = {"repetition_penalty": 1.7, "presence_penalty": 1.5, "logit_bias": {5: 50.0}}
    others = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=30),
        SamplingParams(temperature=0, max_tokens=30, logprobs=5, **penalties),
        SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=3, **penalties),
        SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=5, prompt_logprobs=3),
        SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=0),
    ]
    outputs = generate(llm, [PROMPTS[6]] * 3 + [PROMPTS[5]] * 2, others)
    assert [output.prompt_logprobs for output in outputs[:2]] == [None, None]
    check(outputs[2:3], [expected[6]])
    check(outputs[3:4], [expected[5]])
    assert [len(answer.token_ids) for answer in outputs[3].outputs] == [5, 5, 5]
    assert {score.top for score in outputs[4].prompt_logprobs[1:]} == {()}


def test_the_text_is_the_same_with_and_without_scores(model):
    llm = create_llm(model, max_num_batched_tokens=50)
    plain = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with_scores, without = generate(llm, PROMPTS), generate(llm, PROMPTS, plain)
    assert [o.outputs[0].token_ids for o in with_scores] == [
        o.outputs[0].token_ids for o in without
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_tokens_at_all_may_be_asked_for(model, expected, asynchronous):
    llm = create_llm(
        model, max_model_len=256, max_num_batched_tokens=37, async_scheduling=asynchronous
    )
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=3)
    outputs = generate(llm, PROMPTS, sampling)  # the last prompt fills the context
    check(outputs, expected)
    for output in outputs:
        answer = output.outputs[0]
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "length")
    twice = SamplingParams(max_tokens=0, n=2)
    assert [len(o.outputs) for o in generate(llm, PROMPTS, twice)] == [2] * len(PROMPTS)


def test_nothing_is_scored_beside_a_beam_search():
    with pytest.raises(RequestError, match="prompt_logprobs cannot be combined"):
        SamplingParams(use_beam_search=True, n=2, prompt_logprobs=1)
    with pytest.raises(RequestError) as caught:
        SamplingParams(prompt_logprobs=21)
    assert caught.value.param == "prompt_logprobs"
