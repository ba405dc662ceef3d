"""Vectors of prompts against transformers' last hidden states, in every mode of the engine."""

import numpy as np
import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import ContextLengthError, RequestError
from octavo.testing.tiny_llama import write_tiny_llama

PROMPTS = [[(31 * i + 7 * n) % 301 for i in range(n)] for n in (1, 2, 15, 16, 17, 33, 100, 256)]
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16
KINDS = ("last", "mean")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    """By kind, the vectors of all prompts, not normalised."""
    from transformers import AutoModel

    reference = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        states = [reference(torch.tensor([p])).last_hidden_state[0] for p in PROMPTS]
    return {
        "last": [of_one[-1].numpy() for of_one in states],
        "mean": [of_one.mean(0).numpy() for of_one in states],
    }


def create_llm(model, **options):
    return LLM(str(model), **({"kv_cache_memory_bytes": 2**24} | options), check_integrity=True)


def embed(llm, kind, prompts=PROMPTS, **options):
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.embed(prompts, kind, use_tqdm=False, **options)


def check(outputs, expected):
    for output, vector in zip(outputs, expected, strict=True):
        assert output.outputs.embedding.dtype == np.float32
        np.testing.assert_allclose(output.outputs.embedding, vector, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"async_scheduling": True, "max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"kv_allocator": "contiguous-buddy", "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_vectors_are_those_of_transformers(model, expected, kind, options):
    check(embed(create_llm(model, **options), kind, normalize=False), expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalised_vector_has_length_one(model, expected, kind):
    unit = [vector / np.linalg.norm(vector) for vector in expected[kind]]
    check(embed(create_llm(model), kind), unit)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_changes_no_vector(model, expected, mode, kind, asynchronous):
    from octavo.core import NO_TOKENS, PoolingParams, Request, RequestOptions

    host = {"kv_offloading_size": 0.01} if mode == "swap" else {}
    llm = create_llm(
        model,
        kv_cache_memory_bytes=20 * BLOCK_BYTES,
        max_model_len=300,
        max_num_batched_tokens=20,
        scheduling_policy="priority",
        preemption_mode=mode,
        async_scheduling=asynchronous,
        **host,
    )
    core, vectors = llm.engine.core, {}

    def add(index, priority):
        request = Request(
            request_id=str(index),
            prompt_token_ids=PROMPTS[index],
            sampling=NO_TOKENS,
            pooling=PoolingParams(pooling=kind, normalize=False),
            options=RequestOptions(priority=priority),
            seed=0,
        )
        core.add(request)

    def run(most):
        while core.has_work and most:
            for event in core.step():
                assert event.finish_reason == "stop", event
                vectors[int(event.request_id)] = np.frombuffer(event.vector, np.float32)
            most -= 1

    add(7, 5)  # long and humble: the others push it out when it is half done
    run(most=6)
    for index in (5, 6):
        add(index, 0)
    run(most=1000)
    assert llm.stats().num_preemptions > 0
    for index, vector in vectors.items():
        np.testing.assert_allclose(vector, expected[kind][index], rtol=0, atol=1e-4)
    assert sorted(vectors) == [5, 6, 7]


def test_only_the_mean_needs_all_of_the_prompt(model, expected):
    llm = create_llm(model)
    for kind, num_cached in (("last", 240), ("mean", 0)):
        for _ in range(2):
            outputs = embed(llm, kind, normalize=False)
            check(outputs, expected[kind])
        assert outputs[-1].num_cached_tokens == num_cached


def test_answers_beside_embeddings_stay_what_they_are(model):
    llm = create_llm(model, max_num_batched_tokens=50)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = {"prompt_token_ids": PROMPTS[5]}
    before = llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids
    embed(llm, "mean")
    assert llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids == before
    assert llm.embed("text too", use_tqdm=False)[0].prompt == "text too"


def test_what_cannot_be_embedded_is_refused(model):
    llm = create_llm(model, max_model_len=64)
    assert len(embed(llm, "last", [[5] * 64])) == 1  # the prompt may fill the context
    with pytest.raises(ContextLengthError, match="65 tokens"):
        embed(llm, "last", [[5] * 65])
    with pytest.raises(RequestError, match="pooling must be one of last, mean"):
        embed(llm, "median")
    with pytest.raises(RequestError, match="empty"):
        embed(llm, "last", [[]])
