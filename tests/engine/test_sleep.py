"""Sleep in the caller's process: what is given up, and that nothing else changes."""

import gc
import weakref

import pytest
import torch
from helpers import create_core, create_request, create_scheduler, run_to_end

from octavo import LLM, SamplingParams
from octavo.core import SleepReport
from octavo.errors import CheckpointError, ConfigError, OverloadedError, SleepingError
from octavo.runner import (
    HostCopies,
    give_back_freed_memory,
    reachable_storages,
    taken_bytes,
)
from octavo.testing.tiny_llama import write_tiny_llama
from octavo.testing.tiny_qwen3 import write_tiny_qwen3

MIB = 2**20
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # of the tiny model in fp32
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True, logprobs=2)
PROMPTS = [[(31 * i + n) % 251 for i in range(n)] for n in (1, 17, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def create_llm(model, **options):
    options = {"kv_cache_memory_bytes": 2**22, "device": "cpu", "num_threads": 1} | options
    return LLM(str(model), check_integrity=True, **options)


def answers(llm, sampling=GREEDY, prompts=PROMPTS):
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_qwen3])
def test_the_answers_are_the_same_after_any_sleep(tmp_path, write, asynchronous):
    llm = create_llm(write(tmp_path / "tiny"), async_scheduling=asynchronous)
    before = answers(llm), answers(llm, SEEDED)
    for level in (1, 2, 1, 2, 2):
        report = llm.sleep(level)
        assert report.level == level and report.kv_cache_bytes > 0
        assert (report.weight_bytes > 0) == (level == 2)
        llm.wake_up()
        assert (answers(llm), answers(llm, SEEDED)) == before
    stats = llm.stats()
    assert stats.num_free_blocks == stats.num_blocks
    llm.close()


def test_memory_falls_by_what_is_told(tmp_path):
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    more = {"intermediate_size": 1536, "num_hidden_layers": 3, "vocab_size": 8000}
    llm = create_llm(
        write_tiny_llama(tmp_path / "big", **sizes, **more), kv_cache_memory_bytes=2**25
    )
    prompts = [[(37 * i + n) % 250 for i in range(400)] for n in range(8)]  # in all blocks

    def fallen(level):
        before = answers(llm, prompts=prompts)
        give_back_freed_memory("cpu")  # so that what falls is what is held
        start = taken_bytes("cpu")
        report = llm.sleep(level)
        fall = start - taken_bytes("cpu")
        assert abs(fall - report.freed_bytes) < 4 * MIB
        llm.wake_up()
        assert answers(llm, prompts=prompts) == before
        return report, fall

    report, fall = fallen(1)
    assert 31 * MIB < report.kv_cache_bytes <= fall
    assert report.weight_bytes == 0 and "host" in report.note
    report, fall = fallen(2)
    assert report.weight_bytes > 60 * MIB and report.note == ""
    assert fall >= report.kv_cache_bytes + report.weight_bytes
    llm.close()


def test_what_is_given_up_is_held_by_nobody(model):
    llm = create_llm(model)
    answers(llm)
    executor = llm.engine.core._executor
    held = [weakref.ref(tensor) for tensor in executor._runnable[1].kv_caches]
    runner, weights = weakref.ref(executor._runnable[0]), weakref.ref(executor._model)
    gc.disable()  # no cycle keeps it either: a server's collector may not look for a long while
    try:
        llm.sleep(1)
        assert runner() is None and not any(ref() is not None for ref in held)
        assert weights() is not None
        llm.sleep(2)
        assert weights() is None
    finally:
        gc.enable()
    llm.close()


def test_asleep_it_only_goes_deeper(model):
    llm = create_llm(model)
    light = llm.sleep(1)
    assert llm.sleep(1) is light
    deep = llm.sleep(2)
    assert deep.level == 2 and deep.kv_cache_bytes == light.kv_cache_bytes
    assert deep.weight_bytes > 0 and llm.sleep(1) is deep
    llm.wake_up()
    llm.wake_up()
    assert len(answers(llm)) == 3
    llm.close()


def test_asleep_or_in_use_it_says_so(model):
    llm = create_llm(model)
    stream = llm.stream("Hello", GREEDY)
    next(stream)
    with pytest.raises(OverloadedError, match="must end before"):
        llm.sleep()
    assert len(list(stream)) == 7
    with pytest.raises(ConfigError, match="no sleep level 3"):
        llm.sleep(3)
    llm.sleep()
    with pytest.raises(SleepingError, match="wake it up first"):
        llm.generate("Hello", GREEDY, use_tqdm=False)
    llm.wake_up()
    assert len(answers(llm)) == 3
    llm.close()


def test_what_was_cached_is_forgotten(model):
    llm = create_llm(model)
    prompt = [5] * 64

    def num_cached():
        return llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert (num_cached(), num_cached()) == (0, 48)
    llm.sleep(1)
    llm.wake_up()
    assert (num_cached(), num_cached()) == (0, 48)
    llm.close()


def test_weights_that_are_gone_leave_it_asleep_until_they_are_there(tmp_path):
    path = write_tiny_llama(tmp_path / "tiny")
    llm = create_llm(path)
    before = answers(llm)
    llm.sleep(2)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(CheckpointError):
            llm.wake_up()
        with pytest.raises(SleepingError):
            answers(llm)
    weights.write_bytes(content)
    llm.wake_up()
    assert answers(llm) == before
    llm.close()


def test_other_weights_are_taken_over_and_kv_of_the_old_ones_is_not_found(tmp_path):
    path = write_tiny_llama(tmp_path / "tiny")
    memory = {"kv_cache_memory_bytes": 40 * BLOCK_BYTES, "max_model_len": 256}
    tiers = {"kv_offloading_size": 8 * BLOCK_BYTES / 2**30}
    tiers["kv_offloading_disk_size"] = 100 * BLOCK_BYTES / 2**30  # less than two runs write
    tiers["kv_offloading_disk_path"] = str(tmp_path / "kv")
    llm = create_llm(path, **memory, **tiers)
    many = [[(7 * i + n) % 251 for i in range(200)] for n in range(12)]
    old = answers(llm, prompts=many)
    assert llm.stats().num_transfers["host_to_disk"] > 50
    llm.sleep(2)
    weights, aside = path / "model.safetensors", tmp_path / "aside"
    weights.rename(aside)
    (write_tiny_llama(tmp_path / "other", seed=1) / "model.safetensors").rename(weights)
    llm.wake_up()
    new = answers(llm, prompts=many)
    llm.close()
    fresh = create_llm(path, **memory)
    assert new == answers(fresh, prompts=many) != old
    fresh.close()
    # The file knows whose blocks it holds: an engine with the old weights finds none of them.
    aside.rename(weights)
    again = create_llm(path, **memory, **tiers)
    assert answers(again, prompts=many) == old
    again.close()


def test_host_memory_that_runs_out_leaves_it_awake(model, monkeypatch):
    llm = create_llm(model)
    before = answers(llm)

    def no_memory(storages):
        raise MemoryError("the host is full")

    monkeypatch.setattr("octavo.engine.sleep.HostCopies", no_memory)
    with pytest.raises(MemoryError):
        llm.sleep(1)
    assert answers(llm) == before
    llm.close()


def test_a_runner_that_cannot_be_made_leaves_it_asleep(model, monkeypatch):
    llm = create_llm(model)
    before = answers(llm)
    llm.sleep(1)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.core._executor, "_prepare", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.wake_up()
    with pytest.raises(SleepingError):
        answers(llm)
    llm.wake_up()
    assert answers(llm) == before
    llm.close()


def test_weights_move_in_place(model):
    """What a GPU does at level 1. fp16, for whose kernels on a CPU addresses do not matter."""
    llm = create_llm(model, dtype="float16")
    before = answers(llm)
    weights = llm.engine.core._executor._model
    storages = reachable_storages(weights)
    num_bytes = sum(storage.nbytes() for storage in storages)
    copies = HostCopies(storages)
    assert copies.num_bytes == num_bytes and reachable_storages(weights) == []
    for _ in range(2):
        copies.restore()
        assert sum(storage.nbytes() for storage in reachable_storages(weights)) == num_bytes
        assert answers(llm) == before
        copies.release()
        assert all(storage.nbytes() == 0 for storage in storages)
    llm.close()


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 64])
def test_a_copy_comes_back_whatever_pieces_it_is_cut_into(monkeypatch, num_bytes):
    monkeypatch.setattr("octavo.runner.host_copies.PIECE_BYTES", 16)
    tensor = torch.arange(num_bytes, dtype=torch.uint8)
    view, expected = tensor[num_bytes // 2 :], tensor.clone()
    copies = HostCopies(reachable_storages([tensor, view]))
    assert copies.num_bytes == num_bytes and tensor.untyped_storage().nbytes() == 0
    copies.restore()
    assert torch.equal(tensor, expected) and torch.equal(view, expected[num_bytes // 2 :])


class FakeSleeper:
    """Notes what was asked of it."""

    def __init__(self):
        self.levels = []

    def sleep(self, level):
        self.levels.append(level)
        return SleepReport(level, 0, 0, 0, 0, 0.0)

    def wake_up(self):
        self.levels.append(0)


def test_the_core_sleeps_only_without_requests_and_only_with_a_sleeper():
    core = create_core(create_scheduler(prefix_caching=True), asynchronous=True)
    with pytest.raises(ConfigError, match="no executor that could sleep"):
        core.sleep()
    core._sleeper = sleeper = FakeSleeper()
    core.add(create_request())
    core.step()
    with pytest.raises(OverloadedError):
        core.sleep()
    run_to_end(core)
    core.sleep(1)
    core.sleep(1)
    core.sleep(2)
    with pytest.raises(SleepingError):
        core.add(create_request())
    core.wake_up()
    core.wake_up()
    assert sleeper.levels == [1, 2, 0]
    core.add(create_request())
    run_to_end(core)
