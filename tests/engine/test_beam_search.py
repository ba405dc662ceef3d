"""Beam search and several answers through the whole engine, held to transformers."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import RequestError
from octavo.testing.tiny_llama import write_tiny_llama

PROMPTS = [[(31 * i + 7 * n) % 301 for i in range(n)] for n in (3, 16, 40)]
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # of the tiny model in fp32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def reference(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )


def create_llm(model, **options):
    return LLM(str(model), **({"kv_cache_memory_bytes": 2**24} | options), check_integrity=True)


def beams(llm, prompts, *, n=4, stop_ids=(), **options):
    sampling = SamplingParams(
        use_beam_search=True,
        beam_width=4,
        n=n,
        max_tokens=12,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,
        detokenize=False,
        **options,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        [answer.token_ids for answer in output.outputs]
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]


@torch.inference_mode()
def expected_beams(reference, prompt, *, stop_ids=(), **options):
    found = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=-1,
        **options,
    )
    return [[t for t in row[len(prompt) :].tolist() if t != -1] for row in found]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 2.0},
        {"length_penalty": 0.0, "early_stopping": True},
        {"length_penalty": -1.0, "early_stopping": "never"},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(model, reference, options):
    likely = beams(create_llm(model), PROMPTS)
    # Tokens that do come up end some of the beams early.
    stop_ids = (likely[0][0][3], likely[1][1][5], likely[2][0][8])
    llm = create_llm(model)
    for stops in ((), stop_ids):
        found = beams(llm, PROMPTS, stop_ids=stops, **options)
        for prompt, answers in zip(PROMPTS, found, strict=True):
            expected = expected_beams(reference, prompt, stop_ids=stops, **options)
            assert answers == expected


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_model_len": 128},
        {
            "kv_cache_memory_bytes": 9 * BLOCK_BYTES,
            "max_model_len": 128,
            "kv_offloading_size": 0.01,
        },
        {"enable_prefix_caching": False},
        {"max_num_seqs": 2},
        {"async_scheduling": True},
        {"kv_allocator": "contiguous", "max_model_len": 256},
        {"kv_allocator": "contiguous-buddy", "max_model_len": 256},
    ],
    ids=str,
)
def test_scarce_memory_and_places_do_not_change_the_beams(model, options):
    assert beams(create_llm(model, **options), PROMPTS) == beams(create_llm(model), PROMPTS)


def test_the_best_n_are_returned(model):
    llm = create_llm(model)
    assert beams(llm, PROMPTS, n=2) == [answers[:2] for answers in beams(llm, PROMPTS)]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_several_answers_share_the_prompt_and_are_those_of_single_requests(model, prefix_caching):
    prompt = {"prompt_token_ids": PROMPTS[2]}
    llm = create_llm(model, enable_prefix_caching=prefix_caching)
    many = SamplingParams(n=5, temperature=1.0, seed=7, max_tokens=20, detokenize=False)
    [output] = llm.generate(prompt, many, use_tqdm=False)
    assert llm.stats().num_prompt_tokens == len(PROMPTS[2]) + 4
    one = SamplingParams(n=1, temperature=1.0, seed=7, max_tokens=20, detokenize=False)
    [alone] = llm.generate(prompt, one, use_tqdm=False)
    answers = [answer.token_ids for answer in output.outputs]
    assert answers[0] == alone.outputs[0].token_ids
    assert len({tuple(answer) for answer in answers}) == 5
    again = create_llm(model, enable_prefix_caching=prefix_caching, max_num_seqs=1)
    [output] = again.generate(prompt, many, use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == answers


def test_what_has_no_meaning_in_a_beam_search_is_refused_by_name():
    with pytest.raises(RequestError, match="top_p cannot be combined"):
        SamplingParams(use_beam_search=True, top_p=0.9)
    with pytest.raises(RequestError, match="beam_width needs use_beam_search"):
        SamplingParams(beam_width=4)
