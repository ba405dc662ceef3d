"""KV below the device, forks and beams on a GPU: the same tokens as on the CPU."""

import pytest

from octavo import LLM, SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = pytest.mark.gpu

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # of the tiny model in fp32
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(n)]} for n in (50, 60, 70, 80)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def create_llm(model, num_blocks, device="cuda", **options):
    return LLM(
        str(model),
        device=device,
        kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
        max_model_len=128,
        check_integrity=True,
        **options,
    )


def texts(llm, sampling=GREEDY):
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_way_of_preempting_changes_the_text(model, mode, asynchronous):
    host = {} if mode == "recompute" else {"kv_offloading_size": 64 * BLOCK_BYTES / 2**30}
    llm = create_llm(model, 14, preemption_mode=mode, async_scheduling=asynchronous, **host)
    assert texts(llm) == texts(create_llm(model, 64, "cpu"))
    assert llm.stats().num_preemptions > 0


def test_evicted_prefixes_come_back_from_host_and_disk(model, tmp_path):
    llm = create_llm(
        model,
        10,
        kv_offloading_size=8 * BLOCK_BYTES / 2**30,
        kv_offloading_disk_size=64 * BLOCK_BYTES / 2**30,
        kv_offloading_disk_path=str(tmp_path / "blocks.kv"),
    )
    expected = texts(create_llm(model, 64, "cpu"))
    for _ in range(2):
        found = [llm.generate([prompt], GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
        assert [[output.outputs[0].token_ids] for output in found] == expected
    assert [output.num_cached_tokens for output in found] == [48, 48, 64, 64]
    assert llm.stats().num_transfers["disk_to_device"] > 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=12, detokenize=False),
        SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=20, detokenize=False),
    ],
    ids=["beams", "answers"],
)
def test_beams_and_several_answers_are_those_of_the_cpu(model, sampling):
    assert texts(create_llm(model, 64), sampling) == texts(create_llm(model, 64, "cpu"), sampling)
