"""Modules of transformers over our KV cache on an NVIDIA GPU: eager steps, the same tokens."""

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


@pytest.fixture
def model(tmp_path):
    # Ours, too: so both ways to run it on this device can be compared.
    return str(write_tiny_llama(tmp_path / "tiny"))


def answers(model, **options):
    llm = LLM(model, kv_cache_memory_bytes=2**24, check_integrity=True, **options)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return llm, [output.outputs[0].token_ids for output in outputs]


def test_fp32_tokens_are_those_of_our_own_model_and_of_the_cpu(model):
    bridge = {"model_impl": "transformers"}
    llm, found = answers(model, device="cuda", **bridge)
    assert llm.engine.config.enforce_eager
    assert found == answers(model, device="cuda")[1]
    assert found == answers(model, device="cpu", **bridge)[1]


def test_the_kv_cache_is_sized_by_a_measured_step(model):
    options = {"device": "cuda", "dtype": "bfloat16", "model_impl": "transformers"}
    llm = LLM(model, gpu_memory_utilization=0.3, max_num_seqs=8, **options)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [24] * len(PROMPTS)
    measured = {line.what: line.measured_bytes for line in llm.engine.memory.lines}
    assert measured["activations"] and measured["KV cache"]
    assert "CUDA graphs" not in measured
