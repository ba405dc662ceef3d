"""`--determinism batch-invariant` on a GPU: the same bits in any company."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]}
    for n in (1, 3, 17, 33, 260, 5, 9, 2, 70, 141, 12, 400)
]
REPORTED = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)


def reports(model, prompts, **options):
    llm = LLM(
        model,
        dtype="bfloat16",
        determinism="batch-invariant",
        max_model_len=512,
        gpu_memory_utilization=0.2,
        **options,
    )
    chosen = {report.choice.name for report in llm.engine.kernels}
    assert "triton-invariant" in chosen
    outputs = llm.generate(prompts, REPORTED, use_tqdm=False)
    preempted = llm.stats().num_preemptions
    llm.close()
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs], preempted


def test_logprobs_are_the_same_bits_alone_chunked_cached_and_after_preemption(tmp_path):
    model = str(write_tiny_llama(tmp_path / "tiny", num_hidden_layers=3))
    together, _ = reports(model, PROMPTS)
    for index in (3, 4, 11):
        [alone], _ = reports(model, [PROMPTS[index]])
        assert alone == together[index]
    assert reports(model, PROMPTS, max_num_batched_tokens=37, max_num_seqs=5)[0] == together
    again, _ = reports(model, PROMPTS * 2, max_num_seqs=4)  # the second half finds its prefixes
    assert again == together * 2
    block_bytes = 3 * 2 * 2 * 16 * 2 * 16
    scarce, preempted = reports(model, PROMPTS, kv_cache_memory_bytes=40 * block_bytes)
    assert preempted and scarce == together
