"""`octavo plan` on configs without weights, as a process where its imports matter."""

import json
import subprocess
import sys

import pytest

from octavo.cli import main
from octavo.testing.tiny_models import write_tiny_model

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


@pytest.fixture
def model(tmp_path):
    """A directory with a config.json and nothing else."""
    directory = tmp_path / "llama-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(directory)


def test_the_table_of_a_gpu_that_is_not_here(model, capsys):
    assert main(["plan", model, "--device", "h100-80gb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama-8b on NVIDIA H100 80GB, bfloat16")
    row = {line.split("  ")[0]: line for line in lines if " MiB " in line}
    assert "8,030,261,248 parameters" in row["weights"] and "15,380.5 MiB" in row["weights"]
    assert "KV of a token: 131,072 bytes" in lines
    assert "  full attention: 32 layers of 4,096 bytes" in lines
    # 55 of the 79 GiB are KV cache: 128 KiB a token.
    assert any(line.split() == ["sequences", "of", "131,072", "tokens:", "3"] for line in lines)


def test_the_parts_sum_to_the_device(model, tmp_path):
    target = tmp_path / "plan.json"
    flags = ["--device", "a100-80gb", "--lengths", "400+112:0.5,1500+548:0.5"]
    assert main(["plan", model, *flags, "--json", str(target)]) == 0
    plan = json.loads(target.read_text())
    names = ("weight_bytes", "activation_bytes", "row_bytes", "graph_bytes", "kv_cache_bytes")
    parts = [plan[name] for name in names]
    budget = plan["budget"]
    assert sum(parts) + budget["others_bytes"] + plan["unused_bytes"] == budget["total_bytes"]
    assert plan["num_parameters"] == 8_030_261_248
    assert sum(group["num_parameters"] for group in plan["weights"]) == plan["num_parameters"]
    assert plan["kv_layers"][0]["kind"] == "full attention"
    mix = plan["mix"]
    # Met by output tokens: 112 and 548 of 660. 512 tokens are 32 blocks, 2,048 are 128.
    assert mix["blocks_at_ends"] == pytest.approx((32 * 112 + 128 * 548) / 660)
    assert mix["num_at_ends"] == int(plan["num_blocks"] / mix["blocks_at_ends"])
    assert mix["num_on_average"] > mix["num_at_ends"]


def test_a_model_that_does_not_fit_is_said_and_fails(model, capsys):
    assert main(["plan", model, "--device", "cuda", "--device-memory-gib", "16"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "h100-80gb", "--json", "/no/such/plan.json"], "plan.json cannot be written"),
        (["--device", "h100"], "--device 'h100' is not known"),
        (["--device", "h100-80gb", "--check"], "needs a device of this machine"),
        (["--device", "h100-80gb", "--lengths", "200000:1"], "largest context is 131,072"),
        (["--device", "h100-80gb", "--max-model-len", "200000"], "at most 131072 positions"),
    ],
)
def test_what_cannot_be_planned_is_one_line(model, capsys, flags, message):
    assert main(["plan", model, *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unsupported_architecture_is_refused_by_name(tmp_path, capsys):
    config = LLAMA_8B | {"architectures": ["NoSuchForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--device", "h100-80gb"]) == 1
    assert "NoSuchForCausalLM" in capsys.readouterr().err


def test_the_picture_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    assert main(["plan", model, "--device", "h100-80gb", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size < 150_000
    assert main(["plan", model, "--device", "h100-80gb", "--plot", str(tmp_path / "a" / "b")]) == 1


def test_without_matplotlib_the_extra_is_named(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    target = tmp_path / "plan.png"
    assert main(["plan", model, "--device", "h100-80gb", "--plot", str(target)]) == 1
    assert "octavo[plot]" in capsys.readouterr().err and not target.exists()


CODE = """
import sys
from octavo.cli import main
status = main(["plan", sys.argv[1], "--lengths", "512:1"])
print(status, sorted({"torch", "matplotlib", "transformers"} & set(sys.modules)))
"""


def test_a_plan_imports_no_torch(model):
    # For this machine's own device: even that is asked without torch.
    run = subprocess.run(
        [sys.executable, "-c", CODE, model], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith(" []")


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_runs_the_model_and_agrees(dtype, capsys):
    assert main(["plan", "--check", "--device", "cpu", "--dtype", dtype]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["weights", "activations", "rows", "KV", "total"]
    assert all(abs(float(row[-1].rstrip("%"))) < 5 for row in rows)


def test_check_measures_an_engine_that_is_to_plan_ahead(tmp_path, capsys):
    """Its steps would run in a thread that torch's profiler does not watch."""
    write_tiny_model(tmp_path, "llama")
    flags = ["--async-scheduling", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"]
    memory = ["--kv-cache-memory-bytes", str(2**24), "--num-threads", "1"]
    main(["plan", str(tmp_path), "--check", "--device", "cpu", *flags, *memory])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-5:])
    planned, _, measured, _, error = rows["activations"].split()
    assert float(planned) > 0 and float(measured) > 0
    assert abs(float(error.rstrip("%"))) < 5
