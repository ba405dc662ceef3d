"""SmolLM2-135M in fp32: every greedy token and the logits are those of transformers."""

import pytest
import torch
from prompts import PROMPTS

from octavo import LLM, SamplingParams
from octavo.config import DEFAULT_MODEL, locate, read_model_config
from octavo.kernels import AttentionBatch
from octavo.layers import Build, StepContext, finish_layers, kv_specs
from octavo.models import create_model
from octavo.runner import allocate_kv_caches
from octavo.weights import load_weights, read_tensors

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(llm):
    encoded = [llm.get_tokenizer().encode(text) for text in PROMPTS]
    assert max(map(len, encoded)) > 1000
    return [{"prompt_token_ids": ids} for ids in encoded]


@pytest.fixture(scope="module")
def batched(llm, prompts):
    return tokens(llm, prompts)


def tokens(llm, prompts, sampling=GREEDY):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, sampling, use_tqdm=False)]


@torch.inference_mode()
def test_every_greedy_token_is_the_one_that_transformers_takes(reference, prompts, batched):
    """One pass of the reference over prompt and answer checks each of the 20 × 64 choices.

    Its argmax at every position equals our token there, so by induction its own greedy decoding
    gives the same text.
    """
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + answer])
        logits = reference(ids, logits_to_keep=NUM_TOKENS + 1).logits[0, :-1]
        assert logits.argmax(-1).tolist() == answer


@torch.inference_mode()
def test_transformers_generate_gives_the_same_text(reference, prompts, batched):
    for index in (0, 6, 9):
        ids = torch.tensor([prompts[index]["prompt_token_ids"]])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        assert out[0, ids.shape[1] :].tolist() == batched[index]


@torch.inference_mode()
def test_first_token_logits_are_within_a_thousandth(reference, prompts):
    checkpoint = locate(DEFAULT_MODEL)
    config = read_model_config(checkpoint)
    model = create_model(config, Build("cpu", torch.float32), max_positions=2048)
    load_weights(model.slots(), read_tensors(checkpoint, config, dtype=torch.float32))
    finish_layers(model)
    caches = allocate_kv_caches(
        kv_specs(model), num_blocks=128, block_size=16, dtype=torch.float32, device="cpu"
    )
    for prompt in prompts:
        ids = prompt["prompt_token_ids"]
        positions = torch.arange(len(ids))  # and slots: the blocks lie in their order
        starts = torch.tensor([0, len(ids)], dtype=torch.int32)
        tables = torch.arange(128, dtype=torch.int32)[None]
        attention = AttentionBatch(starts, starts[1:], tables, len(ids), len(ids))
        context = StepContext(positions, positions, attention, caches)
        logits = model.logits(model(torch.tensor(ids), context)[-1:])[0]
        expected = reference(torch.tensor([ids]), logits_to_keep=1).logits[0, 0]
        assert float((logits - expected).abs().max()) < 1e-3


def test_one_at_a_time_gives_the_same_text(llm, prompts, batched):
    for index in (0, 3, 7, 15, 18):
        assert tokens(llm, [prompts[index]]) == [batched[index]]


def test_chunked_prefill_gives_the_same_text(prompts, batched):
    llm = LLM(
        DEFAULT_MODEL,
        dtype="float32",
        kv_cache_memory_bytes=2**28,
        max_num_batched_tokens=171,
        max_num_seqs=7,
        check_integrity=True,
    )
    assert tokens(llm, prompts) == batched


def test_preempted_and_recomputed_requests_give_the_same_text(prompts, batched):
    # 17 prompts of some 10 to 40 tokens and 64 new ones each: 60 blocks cannot hold them all.
    block_bytes = 2 * 30 * 3 * 64 * 4 * 16
    llm = LLM(
        DEFAULT_MODEL,
        dtype="float32",
        kv_cache_memory_bytes=60 * block_bytes,
        max_num_seqs=12,
        check_integrity=True,
    )
    short = [i for i, p in enumerate(prompts) if len(p["prompt_token_ids"]) < 200]
    assert tokens(llm, [prompts[i] for i in short]) == [batched[i] for i in short]
    assert llm.stats().num_preemptions > 0


def test_bf16_says_paris():
    llm = LLM(DEFAULT_MODEL)
    output = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0, max_tokens=32),
        use_tqdm=False,
    )[0].outputs[0]
    assert "Paris" in output.text
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_no_way_of_preempting_changes_the_text(prompts, batched, mode):
    host = {} if mode == "recompute" else {"kv_offloading_size": 0.5}
    some = [0, 3, 7, 15, 18]
    scarce = LLM(
        DEFAULT_MODEL,
        dtype="float32",
        max_model_len=1600,
        kv_cache_memory_bytes=102 * 16 * 46_080,  # 102 blocks: these answers need more
        preemption_mode=mode,
        check_integrity=True,
        **host,
    )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]["prompt_token_ids"]))
    chosen = [longest, *some]
    assert tokens(scarce, [prompts[i] for i in chosen]) == [batched[i] for i in chosen]
    assert scarce.stats().num_preemptions > 0
    moved = scarce.stats().num_transfers.get("device_to_host", 0)
    assert (moved > 0) == (mode == "swap") or mode == "auto"


@torch.inference_mode()
def test_beam_search_is_that_of_transformers(reference, llm, prompts):
    sampling = SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=16)
    chosen = [prompts[i] for i in (0, 6, 9)]
    for prompt, output in zip(chosen, llm.generate(chosen, sampling, use_tqdm=False), strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        found = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=-1,
            eos_token_id=list(llm.engine.config.model.eos_token_ids),
        )
        expected = [[t for t in row[ids.shape[1] :].tolist() if t != -1] for row in found]
        assert [answer.token_ids for answer in output.outputs] == expected
