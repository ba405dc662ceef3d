"""Throughput and decoding speed, on an engine that is real and on one that is made up."""

import json
import time
from types import SimpleNamespace

import pytest

from octavo import LLM
from octavo.bench.draws import Work
from octavo.bench.offline import (
    LatencySetup,
    ThroughputSetup,
    measure_decoding,
    measure_latency,
    measure_throughput,
    run_work,
)
from octavo.bench.suite import SuiteOrder, peer_workloads, run_suite
from octavo.cli import main
from octavo.errors import ConfigError, OctavoError
from octavo.testing.tiny_llama import TINY_CONFIG

OPTIONS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2**24,
    "device": "cpu",
    "num_threads": 1,
}


class PacedLLM:
    """Takes its time: a second for the first token of all, `step_s` for each one after."""

    def __init__(self, monkeypatch, *, step_s=0.25, lost=0):
        self.now, self.step_s, self.lost, self.num_steps = 0.0, step_s, lost, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def generate(self, prompts, sampling, *, use_tqdm):
        longest = max(params.max_tokens for params in sampling)
        self.now += 1.0 + (longest - 1) * self.step_s
        self.num_steps += longest
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[0] * (params.max_tokens - self.lost))]
            )
            for params in sampling
        ]

    def stats(self):
        return SimpleNamespace(num_steps=self.num_steps)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, **OPTIONS)


def test_the_time_between_tokens_leaves_the_first_one_out(monkeypatch):
    found = measure_decoding(PacedLLM(monkeypatch), Work([[1, 2]], [1]), 4)
    assert found.tbt_ms == 250.0 and found.ttft_ms == 1000.0
    assert found.latency_s == 2.0
    assert found.step_ms == 1e3 * 2.0 / 5


def test_a_missing_token_is_an_error(monkeypatch):
    with pytest.raises(OctavoError, match="7 output tokens were asked for, 5 came"):
        run_work(PacedLLM(monkeypatch, lost=1), Work([[1], [2]], [3, 4]))


def test_throughput_counts_all_tokens(llm):
    setup = ThroughputSetup(input_len=20, output_len=4, num_prompts=6, num_iters=3)
    found = measure_throughput(llm, setup)
    assert (found.num_requests, found.num_prompt_tokens, found.num_output_tokens) == (6, 120, 24)
    middle = sorted(found.seconds)[1]
    assert found.total_tokens_per_s == pytest.approx(144 / middle)
    assert found.output_tokens_per_s == pytest.approx(24 / middle)


def test_latency_runs_as_often_as_asked(llm):
    setup = LatencySetup(input_len=8, output_len=4, batch_size=2, num_iters_warmup=2, num_iters=3)
    found = measure_latency(llm, setup)
    assert len(found.runs) == 3 and found.tbt_ms > 0 and found.step_ms > 0


@pytest.mark.parametrize("wrong", [{"input_len": 0}, {"num_prompts": -1}, {"num_iters": 0}])
def test_lengths_and_counts_must_be_positive(wrong):
    with pytest.raises(ConfigError, match="must be a positive integer"):
        ThroughputSetup(**wrong)


def test_the_suite_runs_in_order_and_round_by_round(llm):
    order = SuiteOrder(
        model="",
        options={},
        only=["prefill 8x8192", "offline256", "decode bs1"],
        repeats=1,
        divisor=256,
    )
    found = list(run_suite(llm, order, start_s=time.perf_counter()))
    once = [
        ("offline256", "throughput"),
        ("decode bs1", "TBT"),
        ("decode bs1", "TTFT"),
        ("prefill 8x8192", "throughput"),
    ]
    assert [(figure.workload, figure.metric) for figure in found] == once * 2
    assert [figure.run for figure in found] == [0] * 4 + [1] * 4


def test_the_suite_without_time_runs_everything_once(llm):
    order = SuiteOrder(
        model="", options={}, only=["offline256"], repeats=9, budget_s=0.0, divisor=256
    )
    found = list(run_suite(llm, order, start_s=time.perf_counter()))
    assert [figure.run for figure in found] == [0]


def test_runs_take_turns_with_the_draws():
    _, workloads = peer_workloads(300, divisor=64)
    singles = next(w for w in workloads if w.name == "decode bs1")
    assert len(singles.works) == 2 and singles.works[0] != singles.works[1]


def test_the_commands_print_and_write(model, tmp_path, capsys):
    flags = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--num-threads", "1"]
    flags += ["--kv-cache-memory-bytes", str(2**24)]
    file = tmp_path / "result.json"
    lengths = ["--input-len", "16", "--output-len", "4", "--output-json", str(file)]
    assert main(["bench", "throughput", *flags, *lengths, "--num-prompts", "3"]) == 0
    assert "3 requests, 48 prompt tokens, 12 output tokens" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["result"]["num_output_tokens"] == 12
    assert written["engine_options"]["enable_prefix_caching"] is False
    assert main(["bench", "latency", *flags, *lengths, "--batch-size", "2"]) == 0
    assert "engine step, ms (mean)" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["result"]["runs"]) == 3
