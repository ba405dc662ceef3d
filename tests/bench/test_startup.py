"""Starts in processes of their own: phases add up, caches are where they should be."""

import json
import subprocess
from types import SimpleNamespace

import msgspec
import pytest

from octavo.bench import startup
from octavo.bench.startup import CACHE_VARIABLES, Marks, StartupSetup, measure_startup
from octavo.cli import main
from octavo.errors import ConfigError, OctavoError
from octavo.testing.tiny_llama import TINY_CONFIG


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(tmp_path)


@pytest.mark.server
def test_a_start_is_told_by_its_phases(model, tmp_path, capsys):
    file = tmp_path / "starts.json"
    flags = ["--load-format", "dummy", "--device", "cpu", "--num-threads", "1"]
    flags += ["--kv-cache-memory-bytes", str(2**22), "--output-json", str(file)]
    counts = ["--num-iters-cold", "0", "--num-iters-warm", "1"]
    assert main(["bench", "startup", "--model", model, *flags, *counts]) == 0
    text = capsys.readouterr().out
    assert "warm caches, 1 starts: first token after" in text and "load weights" in text
    (start,) = json.loads(file.read_text())["result"]
    assert start["ready_s"] < start["first_token_s"]
    phases = dict(start["phases"])
    assert sum(phases.values()) == pytest.approx(start["first_token_s"], abs=0.01)
    assert phases["import torch"] > 0.1


@pytest.mark.server
def test_a_start_that_fails_says_why(model):
    with pytest.raises(OctavoError, match="max_model_len is 100000"):
        measure_startup(model, {"max_model_len": 100_000}, StartupSetup(num_iters_cold=0))


def test_cold_starts_have_an_empty_cache_each_and_warm_ones_the_last(monkeypatch):
    environments = []

    def run(command, **options):
        environments.append({name: options["env"].get(name) for name in CACHE_VARIABLES})
        marks = Marks(begun_s=1.0, imported_s=2.0, ready_s=3.0, first_token_s=4.0, phases=[])
        return SimpleNamespace(returncode=0, stdout=b"noise\n" + msgspec.json.encode(marks))

    monkeypatch.setattr(startup, "subprocess", SimpleNamespace(run=run, TimeoutExpired=OSError))
    starts = measure_startup("m", {}, StartupSetup(num_iters_cold=2, num_iters_warm=2))
    assert [start.cache for start in starts] == ["cold", "cold", "warm", "warm"]
    first, second, *warm = environments
    assert all(first[name] != second[name] for name in CACHE_VARIABLES)
    assert warm == [second, second]


def test_a_start_that_hangs_is_an_error(monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OctavoError, match="no first token"):
        measure_startup("m", {}, StartupSetup())


@pytest.mark.parametrize("wrong", [{"num_iters_cold": -1}, {"num_iters_warm": -1}])
def test_counts_are_checked(wrong):
    with pytest.raises(ConfigError):
        StartupSetup(**wrong)
    with pytest.raises(ConfigError, match="nothing to measure"):
        StartupSetup(num_iters_cold=0, num_iters_warm=0)
