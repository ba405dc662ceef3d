"""The ladder in the simulator: every rung is the one it says, and they come in the known order."""

import dataclasses

import pytest
from helpers import create_recorded

from octavo.bench.ladder import (
    RECIPE,
    RUNGS,
    SIZE,
    LadderSizes,
    as_markdown,
    climb,
    draw_ladder,
)
from octavo.sim.replay import ReplaySetup, SimulatedMachine
from octavo.sim.report import ServiceLevel
from octavo.sim.step_time import COSTS, VERSION, FitReport, StepTimes
from octavo.sim.workload import RECIPES, make_workload

# A machine on which a step of one token takes 12 ms and each further token 0.4 ms.
TIMES = StepTimes(
    octavo_steps=VERSION,
    recorded=create_recorded(max_num_seqs=16, max_num_batched_tokens=512),
    costs=dict.fromkeys(COSTS, 0.0) | {"step": 0.012, "token": 0.0004},
    host_costs={"step": 0.0, "sequence": 0.0, "sampled": 0.0},
    fit=FitReport(num_steps=1, median=0.0, p90=0.0, total=0.0),
)


@pytest.fixture(scope="module")
def ladder():
    seen = []
    setup = ReplaySetup(**dataclasses.asdict(LadderSizes()))
    climbed = climb(
        make_workload(RECIPES[RECIPE], SIZE),
        setup,
        SimulatedMachine(TIMES),
        level=ServiceLevel(),
        on_rung=lambda one: seen.append(one.rung.name),
    )
    assert len(seen) == len(set(seen)) == len(RUNGS) - 1  # chunked on paged memory is in both
    return climbed


def throughput(ladder, name):
    return next(c.metrics.output_tokens_per_s for c in ladder if c.rung.title == name)


def test_continuous_batching_makes_at_least_twice_the_throughput_of_static(ladder):
    assert throughput(ladder, "continuous") >= 2.0 * throughput(ladder, "static")
    assert throughput(ladder, "dynamic") < 1.1 * throughput(ladder, "static")


def test_chunks_shorten_the_stalls_and_pages_and_shared_prefixes_admit_more(ladder):
    by_title = {climbed.rung.title: climbed.metrics for climbed in ladder}
    assert by_title["chunked"].tbt_p99_ms < by_title["continuous"].tbt_p99_ms
    assert throughput(ladder, "contiguous") < throughput(ladder, "paged")
    assert throughput(ladder, "paged") < throughput(ladder, "paged+prefix")
    assert by_title["paged"].cached_share == 0.0 < by_title["paged+prefix"].cached_share


def test_every_rung_is_the_engine_that_its_name_says_and_answers_everybody(ladder):
    assert [climbed.rung for climbed in ladder] == list(RUNGS)
    for climbed in ladder:
        setup = climbed.run.setup
        assert (setup.batching, setup.allocator) == (climbed.rung.batching, climbed.rung.allocator)
        num_tokens = sum(len(client.token_times) for client in climbed.run.clients)
        assert num_tokens == make_workload(RECIPES[RECIPE], SIZE).num_output_tokens


def test_the_table_has_a_row_for_each_rung_and_a_ratio_to_static(ladder):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in as_markdown(ladder).splitlines()
    ]
    assert {len(row) for row in rows} == {7}
    cells = {row[0]: row[1:] for row in rows}
    assert [row[0] for row in rows[2:] if row[1]] == [rung.title for rung in RUNGS]
    assert cells["static"][1] == "1.00×"
    ratio = throughput(ladder, "continuous") / throughput(ladder, "static")
    assert cells["continuous"][:2] == [
        f"{throughput(ladder, 'continuous'):.1f} tok/s",
        f"{ratio:.2f}×",
    ]


def test_the_ladder_can_be_drawn(ladder, tmp_path):
    pytest.importorskip("matplotlib")
    draw_ladder(tmp_path / "ladder.png", ladder)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
