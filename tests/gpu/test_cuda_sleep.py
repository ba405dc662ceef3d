"""Sleep on an NVIDIA GPU: its memory is free for others meanwhile, and the answers come back."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

MIB = 2**20
KV_BYTES = 2**28
SHAPE = {
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "vocab_size": 16000,
}
PROMPTS = [{"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 17, 150)]
SAMPLINGS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=24, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "large", **SHAPE))


def answers(llm):
    return [
        [output.outputs[0].token_ids for output in llm.generate(PROMPTS, one, use_tqdm=False)]
        for one in SAMPLINGS
    ]


def free_bytes():
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("level", [1, 2])
def test_the_memory_is_free_and_the_answers_are_the_same(model, level, enforce_eager):
    torch.cuda.empty_cache()
    at_first = torch.cuda.memory_allocated()
    llm = LLM(
        model,
        device="cuda",
        dtype="bfloat16",
        kv_cache_memory_bytes=KV_BYTES,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=256,
        enforce_eager=enforce_eager,
        check_integrity=True,
    )
    before = answers(llm)
    awake = torch.cuda.memory_allocated()
    asleep = []
    for _ in range(3):
        free = free_bytes()
        report = llm.sleep(level)
        asleep.append(free_bytes())
        assert report.weight_bytes > 100 * MIB and report.kv_cache_bytes >= KV_BYTES
        assert report.host_weight_bytes == (report.weight_bytes if level == 1 else 0)
        # Others can have it: it is neither allocated nor kept by torch for its next caller.
        assert torch.cuda.memory_allocated() - at_first < 16 * MIB
        assert asleep[-1] - free >= report.weight_bytes + report.kv_cache_bytes
        assert report.freed_bytes >= report.weight_bytes + report.kv_cache_bytes
        torch.cuda.reset_peak_memory_stats()
        llm.wake_up()
        assert torch.cuda.memory_allocated() < awake + 16 * MIB
        assert answers(llm) == before
        # No step, no graph and no copy needs the memory twice.
        assert torch.cuda.max_memory_allocated() < awake + 128 * MIB
    assert asleep[-1] > asleep[0] - 64 * MIB, "each night leaves more behind"
    stats = llm.stats()
    assert stats.num_free_blocks == stats.num_blocks
    llm.close()


def test_deeper_from_a_light_sleep(model):
    llm = LLM(model, device="cuda", dtype="bfloat16", kv_cache_memory_bytes=KV_BYTES)
    before = answers(llm)
    light = llm.sleep(1)
    deep = llm.sleep(2)
    assert deep.weight_bytes == light.weight_bytes and deep.host_weight_bytes == 0
    llm.wake_up()
    assert answers(llm) == before
    llm.close()
