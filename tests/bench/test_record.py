"""Recording a tiny model: all kinds of steps are met, and the simulator takes the same ones."""

import pytest

from octavo.bench.real_machine import RealMachine
from octavo.bench.record import record, record_steps, recorded_workloads
from octavo.errors import ConfigError
from octavo.sim.replay import ReplaySetup, SimulatedMachine, replay
from octavo.sim.report import ServiceLevel, measure
from octavo.sim.workload import RECIPES, TraceSize, make_workload
from octavo.testing.tiny_llama import write_tiny_llama

SETUP = ReplaySetup(num_blocks=128, max_model_len=256, max_num_seqs=6, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return RealMachine(str(model), device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def steps(machine):
    return record_steps(machine, SETUP)


def test_every_batch_and_every_kind_of_step_is_recorded(steps):
    shapes = [step.shape for step in steps]
    decodes = [s for s in shapes if s.num_tokens == s.num_seqs == s.num_sampled]
    assert {s.num_seqs for s in decodes} == set(range(1, SETUP.max_num_seqs + 1))
    assert max(s.decode_context // s.num_seqs for s in decodes) > 200
    assert any(s.num_seqs == 1 and s.num_tokens == 64 and not s.num_sampled for s in shapes)
    mixed = [s for s in shapes if s.decode_context and s.prefill_attention]
    assert mixed
    assert max(s.num_tokens for s in shapes) == SETUP.max_num_batched_tokens
    assert all(step.seconds > 0 and step.host_s > 0 for step in steps)


def test_a_recording_says_whose_it_is_and_predicts_times_of_its_order(machine, steps):
    times = record(machine, SETUP)
    recorded = times.recorded
    assert (recorded.dtype, recorded.device, recorded.num_threads) == ("float32", "cpu", 1)
    assert recorded.vocab_size == 301
    assert recorded.kv_token_bytes == 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, values, bytes
    assert (recorded.max_num_seqs, recorded.max_num_batched_tokens) == (6, 64)
    assert set(recorded.versions) == {"octavo", "torch", "python"}
    predicted = sum(times.seconds(step.shape) for step in steps)
    measured = sum(step.seconds for step in steps)
    assert measured / 10 < predicted < 10 * measured


def test_the_simulator_takes_exactly_the_steps_that_the_real_engine_takes(machine):
    """Where all requests come at once, time decides nothing: both must plan the same steps."""
    trace = make_workload(
        RECIPES["shared-prefix"], TraceSize(num_requests=20, scale=0.1, max_model_len=1024)
    )
    times = record(machine, SETUP)
    for allocator in ("paged", "paged+prefix"):
        for batching in ("static", "continuous", "chunked"):
            setup = ReplaySetup(
                num_blocks=64,
                max_model_len=128,
                max_num_seqs=6,
                max_num_batched_tokens=64,
                batching=batching,
                allocator=allocator,
            )
            real = replay(trace, setup, machine)
            simulated = replay(trace, setup, SimulatedMachine(times))
            assert [s.shape for s in simulated.steps] == [s.shape for s in real.steps]
            assert [len(c.token_times) for c in simulated.clients] == [
                len(c.token_times) for c in real.clients
            ]
            ours, truth = measure(simulated, ServiceLevel()), measure(real, ServiceLevel())
            assert ours.peak_blocks == truth.peak_blocks
            assert ours.cached_share == truth.cached_share
            assert (ours.cached_share > 0) == (allocator == "paged+prefix")


def test_a_real_replay_waits_for_arrivals_and_may_run_ahead(machine):
    trace = make_workload(RECIPES["alpaca"], TraceSize(num_requests=4, rate=20.0, scale=0.2))
    for asynchronous in (False, True):
        setup = ReplaySetup(num_blocks=64, max_model_len=256, async_scheduling=asynchronous)
        seen = replay(trace, setup, machine)
        for client in seen.clients:
            assert client.token_times[0] > client.request.arrival_s
            assert len(client.token_times) == client.request.num_output_tokens


def test_a_block_size_that_the_model_was_not_loaded_for_is_refused(machine):
    trace = make_workload(RECIPES["alpaca"], TraceSize(num_requests=1))
    with pytest.raises(ConfigError, match="KV blocks of 16 tokens"):
        replay(trace, ReplaySetup(block_size=8), machine)


def test_what_is_recorded_fits_the_engine():
    for setup in (
        SETUP,
        ReplaySetup(),
        ReplaySetup(max_num_seqs=1, max_model_len=64),
        ReplaySetup(num_blocks=40, max_num_seqs=16),
    ):
        for workload in recorded_workloads(setup):
            assert workload.max_num_tokens <= setup.max_model_len
            assert workload.max_num_tokens <= setup.num_blocks * setup.block_size
    with pytest.raises(ConfigError, match="longer context"):
        recorded_workloads(ReplaySetup(max_model_len=20))
