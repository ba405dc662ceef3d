"""`octavo trace`, `bench record`, `sim` and `bench ladder` after one another, on a tiny model."""

import json
import subprocess
import sys

import pytest

from octavo.bench.ladder import RUNGS
from octavo.cli import main
from octavo.testing.tiny_llama import write_tiny_llama

ENGINE = ["--max-model-len", "256", "--num-blocks", "128", "--max-num-seqs", "4"]
ENGINE += ["--max-num-batched-tokens", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, its recorded steps and a trace."""
    folder = tmp_path_factory.mktemp("sim")
    model = write_tiny_llama(folder / "tiny")
    made = ["--num-requests", "12", "--rate", "30", "--scale", "0.1", "--seed", "2"]
    assert main(["trace", "chat", "--out", str(folder / "trace.jsonl"), *made]) == 0
    device = ["--device", "cpu", "--num-threads", "1"]
    steps = ["--out", str(folder / "steps.json")]
    assert main(["bench", "record", str(model), *device, *steps, *ENGINE]) == 0
    return folder


def test_the_trace_says_how_it_was_made(folder):
    header = json.loads((folder / "trace.jsonl").read_text().splitlines()[0])
    made_by = "octavo trace chat --num-requests 12 --rate 30.0 --scale 0.1 --seed 2"
    assert header["made_by"] == made_by
    again = folder / "again.jsonl"
    assert main([*made_by.split()[1:], "--out", str(again)]) == 0
    assert again.read_bytes() == (folder / "trace.jsonl").read_bytes()


def test_sim_prints_the_same_numbers_as_it_writes(folder, capsys):
    result = folder / "out.json"
    files = ["--trace", str(folder / "trace.jsonl"), "--steps", str(folder / "steps.json")]
    assert main(["sim", *files, *ENGINE, "--json", str(result)]) == 0
    shown = capsys.readouterr().out
    assert "KV pool: 128 blocks of 16 tokens, 1.0 MiB" in shown  # 512 bytes a token
    metrics = json.loads(result.read_text())["simulated"]
    assert f"{metrics['output_tokens_per_s']:.1f} tok/s" in shown
    assert metrics["num_requests"] == 12
    assert metrics["num_refused"] == 0


def test_sim_beside_the_model_prints_both_and_the_error(folder, capsys):
    files = ["--trace", str(folder / "trace.jsonl"), "--steps", str(folder / "steps.json")]
    assert main(["sim", *files, *ENGINE, "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["simulated", "real", "error"] for line in lines)
    for heading in ("TTFT p50", "throughput"):
        row = next(line for line in lines if line.startswith(heading))
        assert row.endswith("%")


def test_engines_larger_than_what_was_recorded_are_pointed_out(folder, capsys):
    files = ["--trace", str(folder / "trace.jsonl"), "--steps", str(folder / "steps.json")]
    assert main(["sim", *files, *ENGINE[:-4], "--max-num-seqs", "99"]) == 0
    assert "recorded with max_num_seqs 4" in capsys.readouterr().out


@pytest.mark.parametrize("real", [[], ["--real"]], ids=["simulated", "real"])
def test_the_ladder_has_all_rungs_simulated_and_real(folder, capsys, real):
    files = ["--trace", str(folder / "trace.jsonl"), "--steps", str(folder / "steps.json")]
    result = folder / "ladder.json"
    assert main(["bench", "ladder", *files, *ENGINE, *real, "--json", str(result)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert [t for t in titles if "*" not in t][2:] == [rung.title for rung in RUNGS]
    assert set(json.loads(result.read_text())) == {rung.name for rung in RUNGS}


def test_what_is_missing_is_said_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(folder / "empty"))
    assert main(["sim", "--trace", str(folder / "trace.jsonl")]) == 1
    assert "run `octavo bench record` first" in capsys.readouterr().err
    assert main(["sim", "--trace", str(folder / "none.jsonl")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_simulation_needs_no_torch(folder):
    """It starts at once, and plans the capacity of machines that have no torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from octavo.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    files = ["--trace", str(folder / "trace.jsonl"), "--steps", str(folder / "steps.json")]
    for command in (["sim", *ENGINE], ["bench", "ladder", *ENGINE]):
        run = subprocess.run(
            [sys.executable, "-c", code, *command, *files],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert "tok/s" in run.stdout
