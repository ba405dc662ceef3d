"""`octavo explain --kernels`: the choices of a real engine, without its weights."""

import json

import pytest
import torch

from octavo.cli import main
from octavo.cli.explain import kernel_table, ranges
from octavo.config import DeviceFacts, EngineOptions, model_config_from_hf, resolve
from octavo.engine import build_engine
from octavo.kernels import Choice
from octavo.layers import KernelReport
from octavo.models.weightless import kernel_reports
from octavo.testing.tiny_llama import TINY_CONFIG, write_tiny_llama
from octavo.testing.tiny_qwen3 import write_tiny_qwen3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("write", "changes"),
    [(write_tiny_llama, {}), (write_tiny_llama, {"attention_bias": True}), (write_tiny_qwen3, {})],
)
def test_the_kernels_are_those_that_an_engine_reports(tmp_path, write, changes, dtype):
    values = {"device": "cpu", "dtype": dtype, "kv_cache_memory_bytes": 2**22}
    model = str(write(tmp_path / "tiny", **changes))
    engine = build_engine(EngineOptions.from_flat(model, values))

    def shown(reports):
        return [(report.layer, str(report.choice)) for report in reports]

    assert shown(kernel_reports(engine.config)) == shown(engine.kernels)


def test_no_weight_is_allocated_for_it():
    huge = {"vocab_size": 2**22, "hidden_size": 2**18, "num_attention_heads": 2**12}
    model = model_config_from_hf(TINY_CONFIG | huge | {"num_key_value_heads": 2**12})
    facts = DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40)
    config = resolve(EngineOptions.from_flat("huge", {}), model, facts)
    assert {report.choice.op for report in kernel_reports(config)} >= {"linear", "rms_norm"}


def test_equal_layers_share_a_line(tmp_path, capsys):
    model = write_tiny_qwen3(tmp_path / "tiny", num_hidden_layers=5)
    (model / "model.safetensors").unlink()
    assert main(["explain", str(model), "--kernels", "--device", "cpu", "--dtype", "float16"]) == 0
    title, _, *table = capsys.readouterr().out.splitlines()
    assert title.startswith("tiny on CPU") and title.endswith("float16")
    assert table[0].split() == ["layer", "op", "kernel", "why"]
    assert len(table) < 15
    [line] = [line for line in table if "qk_norm_rotary_kv_write" in line]
    assert line.split()[:3] == ["blocks.0..4.attention.attend", "qk_norm_rotary_kv_write"] + [
        "reference"
    ]
    assert "not native: made for bfloat16 and float32, not float16; not triton: made" in line


def test_a_layer_that_differs_has_a_line_of_its_own():
    fast, slow = Choice("op", "fast", None, ()), Choice("op", "slow", None, (("fast", "odd"),))
    kernels = [fast, fast, slow, fast]
    reports = [KernelReport(f"blocks.{i}.mlp.up", kernel) for i, kernel in enumerate(kernels)]
    assert kernel_table([KernelReport("vocabulary", slow), *reports]).splitlines()[1:] == [
        "vocabulary            op  slow    not fast: odd",
        "blocks.0..1,3.mlp.up  op  fast",
        "blocks.2.mlp.up       op  slow    not fast: odd",
    ]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0..2,5,7..8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_a_device_that_is_not_here_is_an_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    assert main(["explain", str(tmp_path), "--kernels", "--device", "cuda"]) == 1
    assert "torch sees no NVIDIA GPU" in capsys.readouterr().err
