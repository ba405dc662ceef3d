"""Replays in virtual time: numbers equal those computed by hand, and nobody is short-changed."""

import dataclasses
import itertools
import json
import sys

import pytest
from helpers import create_recorded

from octavo.errors import ConfigError, IntegrityError
from octavo.kvcache import ALLOCATORS
from octavo.scheduler import BATCHINGS, POLICIES
from octavo.sim import replay as replay_module
from octavo.sim.replay import EngineSizes, ReplaySetup, SimulatedMachine, replay
from octavo.sim.report import Metrics, ServiceLevel, as_table, compare, draw, measure, write_json
from octavo.sim.step_time import COSTS, HOST_COSTS, VERSION, FitReport, StepTimes
from octavo.sim.workload import (
    RECIPES,
    TraceHeader,
    TraceRequest,
    TraceSize,
    Workload,
    make_workload,
)

RECORDED = create_recorded()


def step_times(*, host_s=0.0, **costs):
    return StepTimes(
        octavo_steps=VERSION,
        recorded=RECORDED,
        costs=dict.fromkeys(COSTS, 0.0) | costs,
        host_costs=dict.fromkeys(HOST_COSTS, 0.0) | {"step": host_s},
        fit=FitReport(num_steps=1, median=0.0, p90=0.0, total=0.0),
    )


def workload(*requests, block_size=4):
    """Requests as (arrival, prompt, output), perhaps with further fields."""
    header = TraceHeader(octavo_trace=1, block_size=block_size)
    return Workload(
        header,
        tuple(
            TraceRequest(
                arrival_s=arrival,
                num_prompt_tokens=prompt,
                num_output_tokens=output,
                **(more[0] if more else {}),
            )
            for arrival, prompt, output, *more in requests
        ),
    )


def run(trace, times=None, **setup):
    sizes = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    machine = SimulatedMachine(times or step_times(step=0.1, host_s=0.01))
    return replay(trace, ReplaySetup(**(sizes | setup)), machine)


def test_the_numbers_of_a_small_trace_are_those_computed_by_hand():
    """Steps of 110 ms end at 110, 220, 330 and 440; the second request is seen at 220."""
    seen = run(workload((0.0, 4, 3), (0.15, 4, 2)))
    first, second = seen.clients
    assert list(first.token_times) == pytest.approx([0.11, 0.22, 0.33])
    assert list(second.token_times) == pytest.approx([0.33, 0.44])
    assert [(m.num_running, m.num_waiting) for m in seen.moments] == [
        (1, 0),
        (1, 0),
        (1, 0),
        (0, 0),
    ]
    # Prompts of 4 fill a block, the next token needs another; ended requests hold nothing.
    assert [m.num_used_blocks for m in seen.moments] == [1, 2, 1, 0]
    metrics = measure(seen, ServiceLevel(ttft_slo_ms=150.0, tbt_slo_ms=120.0))
    assert metrics == Metrics(
        num_requests=2,
        num_refused=0,
        duration_s=pytest.approx(0.44),
        ttft_p50_ms=pytest.approx(145.0),  # between 110 and 180
        ttft_p99_ms=pytest.approx(179.3),
        tbt_p50_ms=pytest.approx(110.0),
        tbt_p99_ms=pytest.approx(110.0),
        output_tokens_per_s=pytest.approx(5 / 0.44),
        requests_per_s=pytest.approx(2 / 0.44),
        goodput_per_s=pytest.approx(1 / 0.44),  # the second one's first token came too late
        num_steps=4,
        num_preemptions=0,
        num_blocks=64,
        peak_blocks=2,
        mean_blocks=pytest.approx(1.0),
        cached_share=0.0,
    )


def test_a_stall_between_tokens_makes_a_request_bad_and_is_seen_in_the_gaps():
    """Prompts first: the long second prompt takes three steps, in which nobody gets a token."""
    trace = workload((0.0, 4, 12), (0.15, 48, 1))
    metrics = measure(
        run(trace, batching="continuous"), ServiceLevel(ttft_slo_ms=1000.0, tbt_slo_ms=200.0)
    )
    assert metrics.tbt_p99_ms == pytest.approx(110 + 0.9 * 330)  # one gap of eleven
    assert metrics.goodput_per_s * metrics.duration_s == pytest.approx(1)
    smooth = measure(run(trace), ServiceLevel(ttft_slo_ms=1000.0, tbt_slo_ms=200.0))
    assert smooth.tbt_p99_ms == pytest.approx(110)
    assert smooth.goodput_per_s * smooth.duration_s == pytest.approx(2)


def test_steps_cost_what_their_tokens_and_context_cost():
    """One prompt of 8 and two decodes, with a cost for each kind of work."""
    times = step_times(
        token=1.0, sampled=0.01, **{"decode context": 0.0001, "prefill attention": 0.000001}
    )
    seen = run(workload((0.0, 8, 3)), times)
    prefill = 8 * 1.0 + 0.01 + 36 * 0.000001
    decodes = [1.01 + 0.0001 * 9, 1.01 + 0.0001 * 10]
    expected = list(itertools.accumulate([prefill, *decodes]))
    assert list(seen.clients[0].token_times) == pytest.approx(expected)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_gets_exactly_its_output(policy, batching, allocator, asynchronous):
    trace = make_workload(
        RECIPES["chat"],
        TraceSize(num_requests=24, rate=20.0, scale=0.05, max_model_len=1024, block_size=4),
    )
    seen = run(
        trace,
        policy=policy,
        batching=batching,
        allocator=allocator,
        async_scheduling=asynchronous,
        num_blocks=40,
        max_model_len=64,
    )
    for client in seen.clients:
        assert len(client.token_times) == client.request.num_output_tokens
        assert client.token_times[0] > client.request.arrival_s
        assert list(client.token_times) == sorted(client.token_times)
    assert max(moment.num_used_blocks for moment in seen.moments) <= 40
    assert seen.moments[-1].num_used_blocks == 0


def test_scarce_memory_preempts_and_the_replay_counts_it():
    trace = workload(*[(0.0, 8, 40)] * 6)
    assert measure(run(trace, num_blocks=24), ServiceLevel()).num_preemptions > 0
    assert measure(run(trace, num_blocks=100), ServiceLevel()).num_preemptions == 0


def test_a_replay_is_the_same_every_time():
    trace = make_workload(
        RECIPES["alpaca"], TraceSize(num_requests=30, rate=10.0, seed=4, max_model_len=200)
    )
    assert run(trace).moments == run(trace).moments


def test_time_passes_between_requests_that_are_far_apart():
    seen = run(workload((0.0, 4, 1), (100.0, 4, 1)))
    assert [list(c.token_times) for c in seen.clients] == [
        pytest.approx([0.11]),
        pytest.approx([100.11]),
    ]
    # Nobody holds memory after the step in which a request ends.
    assert measure(seen, ServiceLevel()).mean_blocks == 0.0


def test_asynchronous_planning_is_hidden_behind_the_device_or_the_other_way_round():
    trace = workload((0.0, 4, 50))
    for host_s, device_s in ((0.02, 0.1), (0.1, 0.02)):
        times = step_times(step=device_s, host_s=host_s)
        one_by_one = run(trace, times).clients[0].token_times[-1]
        overlapped = run(trace, times, async_scheduling=True).clients[0].token_times[-1]
        assert one_by_one == pytest.approx(50 * 0.12)
        assert overlapped == pytest.approx(50 * 0.1, rel=0.05)


def test_dynamic_batching_waits_its_window_in_virtual_time():
    seen = run(workload((0.0, 4, 1), (0.03, 4, 1)), batching="dynamic")
    first, second = (client.token_times[0] for client in seen.clients)
    assert first == second  # one batch
    assert 0.05 + 0.11 <= first < 0.05 + 0.11 + 0.03


def test_a_prefix_cache_finds_what_the_trace_says_is_shared():
    shared = {"prefix": (1, 2)}
    trace = workload((0.0, 12, 2, shared), (10.0, 12, 2, shared), (20.0, 12, 2))
    seen = run(trace, allocator="paged+prefix")
    assert [client.num_cached_tokens for client in seen.clients] == [0, 8, 0]
    assert measure(seen, ServiceLevel()).cached_share == pytest.approx(8 / 36)
    assert measure(run(trace, allocator="paged"), ServiceLevel()).cached_share == 0.0


def test_a_deadline_that_cannot_be_met_is_a_refusal_and_not_a_failure():
    """The first request teaches the engine how fast it is: 4 tokens in 110 ms."""
    trace = workload((0.0, 4, 2), (1.0, 400, 1), (1.0, 400, 1, {"deadline_ms": 200}))
    seen = run(trace, policy="deadline", num_blocks=400)
    assert [client.refusal is None for client in seen.clients] == [True, True, False]
    metrics = measure(seen, ServiceLevel())
    assert (metrics.num_requests, metrics.num_refused) == (3, 1)


def test_a_request_that_can_never_run_is_named():
    with pytest.raises(ConfigError, match=r"request 1 of the trace: .*context"):
        run(workload((0.0, 4, 2), (0.0, 60, 5)), max_model_len=64)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineSizes)])
def test_sizes_must_be_positive(field):
    with pytest.raises(ConfigError, match=field):
        ReplaySetup(**{field: 0})


def test_an_engine_that_gets_stuck_does_not_hang_the_simulator(monkeypatch):
    class Never:
        name = "never"

        def fill(self, step):
            pass

    monkeypatch.setattr("octavo.scheduler.build.create_batching", lambda *a, **k: Never())
    monkeypatch.setattr(replay_module, "MAX_IDLE_LOOKS", 20)
    with pytest.raises(IntegrityError, match="1 requests wait, and none of them can run"):
        run(workload((0.0, 4, 2)))


def test_reports_hold_the_numbers_and_the_errors(tmp_path):
    level = ServiceLevel()
    slow = measure(run(workload((0.0, 4, 3))), level)
    fast = measure(run(workload((0.0, 4, 3)), step_times(step=0.055)), level)
    table = dict(
        (line[:20].strip(), line.split()[-2:]) for line in as_table({"run": slow}).splitlines()[1:]
    )
    assert table["TTFT p50"] == ["110", "ms"]
    assert table["throughput"] == ["9.1", "tok/s"]
    rows = [line.split() for line in compare(simulated=fast, real=slow).splitlines()]
    assert ["TTFT", "p50", "55", "ms", "110", "ms", "-50.0%"] in rows
    assert ["throughput", "18.2", "tok/s", "9.1", "tok/s", "+100.0%"] in rows
    write_json(tmp_path / "out.json", {"run": slow})
    assert json.loads((tmp_path / "out.json").read_text())["run"]["ttft_p50_ms"] == pytest.approx(
        110
    )
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path / "none" / "out.json", {"run": slow})


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    seen = run(workload((0.0, 4, 3), (0.15, 4, 1)))
    draw(tmp_path / "plot.png", {"simulated": seen, "real": seen})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(tmp_path / "plot.nonsense", {"simulated": seen})


def test_a_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"octavo\[plot\]"):
        draw(tmp_path / "plot.png", {})


def test_a_clock_that_is_far_on_still_reaches_every_arrival():
    """A gap below the clock's resolution must not stop it."""
    machine = SimulatedMachine(step_times(step=0.1))
    machine.wait(1e7)
    trace = workload(*[(0.001 * i + 1e-13, 4, 1) for i in range(40)])
    seen = replay(trace, ReplaySetup(batching="dynamic", block_size=4), machine)
    assert all(len(client.token_times) == 1 for client in seen.clients)
