"""The whole engine on an NVIDIA GPU, held against the same engine on the CPU."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 7, 16, 17, 150)
]


def answers(llm, sampling=GREEDY, prompts=PROMPTS):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, sampling, use_tqdm=False)]


def test_fp32_tokens_on_the_gpu_are_those_of_the_cpu(tmp_path):
    model = str(write_tiny_llama(tmp_path / "tiny"))
    on_cpu = LLM(model, device="cpu", kv_cache_memory_bytes=2**24)
    on_gpu = LLM(model, device="cuda", kv_cache_memory_bytes=2**24, check_integrity=True)
    assert answers(on_gpu) == answers(on_cpu)
    chunked = LLM(model, device="cuda", kv_cache_memory_bytes=2**24, max_num_batched_tokens=13)
    assert answers(chunked) == answers(on_cpu)


def test_seeded_draws_do_not_depend_on_the_batch(tmp_path):
    model = str(write_tiny_llama(tmp_path / "tiny"))
    llm = LLM(model, device="cuda", kv_cache_memory_bytes=2**24)
    sampling = SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=11, max_tokens=24)
    together = answers(llm, sampling)
    alone = [answers(llm, sampling, [prompt])[0] for prompt in PROMPTS]
    assert together == alone


def test_kv_memory_is_measured_and_the_peak_stays_within_the_share(tmp_path):
    model = str(write_tiny_llama(tmp_path / "tiny"))
    llm = LLM(model, dtype="bfloat16", gpu_memory_utilization=0.2)
    answers(llm)
    total = torch.cuda.get_device_properties(0).total_memory
    assert torch.cuda.max_memory_reserved() <= 0.21 * total
    assert llm.engine.num_blocks > 10_000
