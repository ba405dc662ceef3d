"""KV on the host and on disk with a real model: the text never changes, and restarts remember."""

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError
from octavo.testing.tiny_llama import write_tiny_llama

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # of the tiny model in fp32
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(n)]} for n in (50, 60, 70, 80)
]
GIB_OF_BLOCKS = BLOCK_BYTES / 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def create_llm(model, num_blocks, **options):
    return LLM(
        str(model),
        kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
        max_model_len=128,
        check_integrity=True,
        **options,
    )


def texts(llm, prompts=PROMPTS):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


def cached(llm, prompt):
    [output] = llm.generate([prompt], GREEDY, use_tqdm=False)
    return output.num_cached_tokens, output.outputs[0].token_ids


@pytest.fixture(scope="module")
def expected(model):
    return texts(create_llm(model, 64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
def test_swap_recompute_and_no_preemption_give_the_same_text(model, mode, dtype):
    size = 1 if dtype == "float32" else 2  # bf16 blocks take half the bytes
    offloading = {} if mode == "recompute" else {"kv_offloading_size": 64 * GIB_OF_BLOCKS}
    llm = create_llm(model, 14 // size, preemption_mode=mode, dtype=dtype, **offloading)
    assert texts(llm) == texts(create_llm(model, 64, dtype=dtype))
    assert llm.stats().num_preemptions > 0


def test_evicted_prefixes_come_back_from_host_and_disk(model, expected, tmp_path):
    llm = create_llm(
        model,
        10,
        kv_offloading_size=8 * GIB_OF_BLOCKS,
        kv_offloading_disk_size=64 * GIB_OF_BLOCKS,
        kv_offloading_disk_path=str(tmp_path / "blocks.kv"),
    )
    first = [cached(llm, prompt) for prompt in PROMPTS]
    second = [cached(llm, prompt) for prompt in PROMPTS]
    assert [text for _, text in first] == [text for _, text in second] == expected
    assert [count for count, _ in second] == [48, 48, 64, 64]


@pytest.fixture
def left_behind(model, tmp_path):
    """A KV file that an engine wrote and left."""
    path = tmp_path / "blocks.kv"
    options = {
        "kv_offloading_size": 8 * GIB_OF_BLOCKS,
        "kv_offloading_disk_size": 64 * GIB_OF_BLOCKS,
        "kv_offloading_disk_path": str(path),
    }
    llm = create_llm(model, 10, **options)
    for prompt in PROMPTS * 2:
        cached(llm, prompt)
    llm.close()
    return path, options


def test_blocks_on_disk_survive_a_restart(model, expected, left_behind):
    _, options = left_behind
    count, text = cached(create_llm(model, 10, **options), PROMPTS[0])
    assert (count, text) == (48, expected[0])


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_was_reset_is_found_on_disk_neither_now_nor_after_a_restart(
    model, expected, left_behind, async_scheduling
):
    path, options = left_behind
    llm = create_llm(model, 10, **options, async_scheduling=async_scheduling)
    size_before = path.stat().st_size
    llm.engine.core.reset_prefix_cache()
    assert cached(llm, PROMPTS[0]) == (0, expected[0])
    llm.engine.core.reset_prefix_cache()
    llm.close()
    assert path.stat().st_size == size_before
    llm = create_llm(model, 10, **options)
    assert [cached(llm, prompt) for prompt in PROMPTS] == [(0, text) for text in expected]
    assert [cached(llm, prompt)[0] for prompt in PROMPTS] == [48, 48, 64, 64]  # it is used again


def test_a_disk_that_cannot_be_emptied_is_told(model, left_behind, monkeypatch):
    _, options = left_behind
    llm = create_llm(model, 10, **options)

    def fail(*_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.ftruncate", fail)
        with pytest.raises(OSError):
            llm.engine.core.reset_prefix_cache()
    assert cached(llm, PROMPTS[0])[0] == 0  # forgotten at least until the next start


def test_damaged_blocks_are_computed_again(model, expected, left_behind, caplog):
    path, options = left_behind
    content = bytearray(path.read_bytes())
    for position in range(4096 + 100, len(content), 500):
        content[position] ^= 0xFF
    path.write_bytes(content)
    llm = create_llm(model, 10, **options)
    assert [cached(llm, prompt)[1] for prompt in PROMPTS] == expected
    assert "damaged" in caplog.text


def test_a_file_cut_short_is_no_danger(model, expected, left_behind):
    path, options = left_behind
    path.write_bytes(path.read_bytes()[:10_000])
    llm = create_llm(model, 10, **options)
    assert [cached(llm, prompt)[1] for prompt in PROMPTS] == expected


def test_the_blocks_of_other_weights_are_not_used(left_behind, tmp_path, caplog):
    _, options = left_behind
    other = write_tiny_llama(tmp_path / "other", seed=1)
    llm = create_llm(other, 10, **options)
    assert cached(llm, PROMPTS[0])[0] == 0
    assert "emptied" in caplog.text


def test_two_engines_do_not_share_a_file(model, left_behind):
    _, options = left_behind
    first = create_llm(model, 10, **options)
    with pytest.raises(ConfigError, match="another engine uses the KV file"):
        create_llm(model, 10, **options)
    first.close()
    create_llm(model, 10, **options).close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preemption_mode": "swap"}, "set kv_offloading_size"),
        ({"kv_offloading_disk_size": 1.0}, "set kv_offloading_size"),
        ({"kv_offloading_size": 0.1, "enable_prefix_caching": False}, "prefix caching"),
        ({"kv_offloading_size": 0.1, "kv_allocator": "contiguous"}, "paged"),
        ({"kv_offloading_size": -1.0}, "greater than 0"),
        ({"kv_offloading_size": 1e9}, "are free"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_remedy(model, options, message):
    with pytest.raises(ConfigError, match=message):
        create_llm(model, 10, **options)
