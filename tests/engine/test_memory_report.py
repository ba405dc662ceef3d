"""Planned against measured memory: storages that are alive, and every allocation of a step."""

import contextlib
import gc
import json
import logging

import pytest
import torch

from octavo.config import DEFAULT_MODEL, DeviceFacts, EngineOptions
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.engine import build_engine
from octavo.engine.memory_report import (
    TOLERANCE,
    Comparison,
    MemoryMeter,
    MemoryReport,
    measure_largest_step,
    reachable_bytes,
    with_activations,
)
from octavo.errors import ConfigError, EngineDeadError
from octavo.kernels import native, reference_only
from octavo.testing.tiny_llama import write_tiny_llama

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}"
)


def build(model, *, references=False, **options):
    defaults = {"device": "cpu", "kv_cache_memory_bytes": 2**24}
    with reference_only() if references else contextlib.nullcontext():
        return build_engine(EngineOptions.from_flat(str(model), defaults | options))


def planned(engine, compiled):
    facts = DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40)
    return plan_memory(
        engine.config, device_budget(facts, major=0, utilization=1.0), compiled=compiled
    )


def bytes_of_all_tensors():
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_but_the_planned_weights_and_kv_stays_alive(tmp_path, dtype, tied):
    model = write_tiny_llama(
        tmp_path / "tiny", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True
    )
    before = bytes_of_all_tensors()
    engine = build(model, dtype=dtype)
    weights, _, rows, kv_cache = engine.memory.lines
    assert weights.planned_bytes == weights.measured_bytes
    assert abs(rows.error) < 0.001
    assert kv_cache.planned_bytes == kv_cache.measured_bytes
    # Plain weights are gone once they are packed: the process holds what the engine leads to.
    held = weights.measured_bytes + rows.measured_bytes + kv_cache.measured_bytes
    assert bytes_of_all_tensors() - before == held


SMALL_MLP = {"intermediate_size": 16}
# The first block has no residual yet, and the last one ends with the drawn tokens only.
THREE_BLOCKS = {"num_hidden_layers": 3}
MOMENTS = [
    # (compiled kernels, changes of the model, sequences, tokens, the moment that must be highest)
    (True, THREE_BLOCKS, 1, 512, "MLP"),
    (True, SMALL_MLP, 2, 512, "attention"),
    (True, {}, 64, 128, "draw"),
    (False, {"intermediate_size": 300} | THREE_BLOCKS, 64, 512, "MLP"),
    (False, {}, 1, 512, "attention in plain torch"),
    (False, {}, 64, 128, "draw"),
    (False, SMALL_MLP | {"head_dim": 32}, 64, 512, "rotation in plain torch"),
    (
        False,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 512}
        | SMALL_MLP
        | THREE_BLOCKS,
        64,
        512,
        "norm in plain torch",
    ),
]


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("compiled", "changes", "seqs", "tokens", "moment"), MOMENTS)
def test_each_moment_is_what_the_allocator_sees(
    tmp_path, dtype, compiled, changes, seqs, tokens, moment
):
    model = write_tiny_llama(tmp_path / "tiny", **changes)
    engine = build(
        model,
        references=not compiled,
        dtype=dtype,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
    )
    plan = planned(engine, None if compiled else frozenset())
    assert plan.peak.name == moment
    measured = measure_largest_step(engine.core, engine.config)
    assert plan.activation_bytes == pytest.approx(measured, rel=TOLERANCE)


def test_a_second_measurement_finds_what_the_first_did(tmp_path):
    engine = build(write_tiny_llama(tmp_path / "tiny"), max_num_seqs=8, max_num_batched_tokens=64)
    first = measure_largest_step(engine.core, engine.config)
    engine.core.reset_prefix_cache()
    assert measure_largest_step(engine.core, engine.config) == first > 0


def test_steps_that_run_elsewhere_are_not_said_to_take_nothing(tmp_path):
    engine = build(write_tiny_llama(tmp_path / "tiny"), async_scheduling=True)
    with pytest.raises(ConfigError, match="without async_scheduling"):
        measure_largest_step(engine.core, engine.config)


def test_a_largest_step_that_fails_is_no_measurement(tmp_path, monkeypatch):
    engine = build(write_tiny_llama(tmp_path / "tiny"))

    def fail(plan):
        raise MemoryError("nothing left")

    monkeypatch.setattr(engine.core._executor, "execute", fail)
    with pytest.raises(EngineDeadError, match="largest step failed"):
        measure_largest_step(engine.core, engine.config)


def test_a_storage_counts_once_however_it_is_reached():
    tensor = torch.zeros(10, dtype=torch.float64)
    holder = {"all": tensor, "part": [tensor[2:4]], "other": torch.zeros(3, dtype=torch.int8)}
    assert reachable_bytes(holder) == 80 + 3


def test_the_report_reads_as_one_line_and_knows_its_largest_error():
    lines = (
        Comparison("weights", 100 * 2**20, 100 * 2**20),
        Comparison("activations", 8 * 2**20, None),
        Comparison("KV cache", 300 * 2**20, 200 * 2**20),
    )
    report = MemoryReport(lines)
    assert report.total == Comparison("total", 400 * 2**20, 300 * 2**20)
    assert report.largest_error == pytest.approx(0.5)
    assert str(report) == (
        "weights 100.0 MiB planned, 100.0 measured; activations 8.0 MiB planned; "
        "KV cache 300.0 MiB planned, 200.0 measured; total 400.0 MiB planned, 300.0 measured"
    )
    found = with_activations(report, 10 * 2**20)
    assert found.lines[1].error == pytest.approx(-0.2)
    assert found.total == Comparison("total", 408 * 2**20, 310 * 2**20)


def test_a_plan_that_does_not_hold_is_a_warning(tmp_path, caplog):
    engine = build(write_tiny_llama(tmp_path / "tiny"))
    facts = DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40)
    with caplog.at_level(logging.INFO, logger="octavo.engine"):
        meter = MemoryMeter(engine.config, facts)
        meter.weights_are_laid_out([])  # a model without weights
        report = meter.report()
    assert report.largest_error == 0.0  # nothing measured: nothing to compare
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="octavo.engine"):
        meter = MemoryMeter(engine.config, facts)
        meter.weights_are_laid_out([torch.zeros(5)])
        meter.report()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@needs_native
@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_of_smollm2_holds(dtype):
    engine = build_engine(EngineOptions.from_flat(DEFAULT_MODEL, {"device": "cpu", "dtype": dtype}))
    report = with_activations(engine.memory, measure_largest_step(engine.core, engine.config))
    assert all(line.measured_bytes for line in report.lines)
    assert report.largest_error < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_the_plan_of_a_gpu_engine_holds_for_weights_step_and_kv(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = {"device": "cuda", "load_format": "dummy", "gpu_memory_utilization": 0.5}
    engine = build_engine(EngineOptions.from_flat(str(tmp_path), flags))
    assert all(line.measured_bytes for line in engine.memory.lines)
    assert engine.memory.largest_error < TOLERANCE
