"""`octavo bench memory`: the claims of PagedAttention's figure 2, as inequalities."""

import subprocess
import sys

import pytest

from octavo.bench.memory import (
    SCHEMES,
    MemorySetup,
    compare_memory,
    draw_workload,
    measure_scheme,
)
from octavo.cli import main
from octavo.errors import ConfigError

SMALL = ["--num-requests", "60", "--num-slots", "1024", "--max-model-len", "512"]


@pytest.fixture(scope="module")
def rows():
    setup = MemorySetup(num_requests=200)
    return {row.scheme.name: row for row in compare_memory(setup, draw_workload(setup))}


def test_every_slot_is_in_one_category(rows):
    for row in rows.values():
        assert row.used + row.reserved + row.internal + row.others == pytest.approx(1)


def test_contiguous_runs_hold_little_and_pages_nearly_nothing_else(rows):
    """20.4% to 38.2% before, and 96.3% after."""
    assert rows["contiguous"].used < 0.25
    assert rows["contiguous"].used < rows["contiguous-buddy"].used < rows["oracle"].used < 0.45
    paged = rows["paged"]
    assert paged.used > 0.95
    given = paged.used + paged.reserved + paged.internal + paged.rounding
    assert paged.used / given > 0.96
    assert paged.external == 0


def test_each_way_of_wasting_is_where_it_belongs(rows):
    assert rows["contiguous"].internal > 0.5  # room for the longest, mostly never used
    assert rows["contiguous-buddy"].internal > 0.1  # lengths doubled at most
    assert rows["oracle"].internal == 0
    assert rows["oracle"].reserved > 0.2  # even who knows the end must keep room for it
    for name in ("contiguous-buddy", "oracle"):
        assert rows[name].rounding > 0.15 and rows[name].external > 0.05


def test_the_shares_are_close_to_those_that_the_paper_published(rows):
    for row in rows.values():
        ours = (row.used, row.reserved, row.internal, row.others)
        for share, published in zip(ours, row.scheme.published.percent, strict=True):
            if published is not None:
                assert 100 * share == pytest.approx(published, abs=10), row
        assert row.num_running == pytest.approx(
            row.scheme.published.num_running["sharegpt"], rel=0.2
        )


def test_more_useful_memory_is_more_tokens_a_step(rows):
    """Section 6.2: vLLM batches 4.3 times what Orca (Max) does, and 2.2 times Orca (Oracle)."""
    paged = rows["paged"].num_tokens_per_step
    assert paged > 4 * rows["contiguous"].num_tokens_per_step
    assert paged > 2 * rows["oracle"].num_tokens_per_step


def test_larger_blocks_waste_more():
    paged = SCHEMES[-1]
    used = []
    for block_size in (16, 256):
        setup = MemorySetup(num_requests=150, block_size=block_size)
        used.append(measure_scheme(paged, setup, draw_workload(setup)).used)
    assert used[0] > used[1] + 0.1


def test_the_spread_of_lengths_is_what_the_papers_figures_imply():
    """A request that runs has 298 tokens left on average: 13.3% of 15.7K slots for 7 of them."""
    workload = draw_workload(MemorySetup(num_requests=20_000))
    lengths = [request.num_output_tokens for request in workload.requests]
    assert sum(lengths) / len(lengths) == pytest.approx(337.99, rel=0.03)
    left = sum(n * n for n in lengths) / sum(lengths) / 2
    assert left == pytest.approx(0.133 * 15_700 / 7, rel=0.08)  # the context cuts the longest


def test_the_same_seed_gives_the_same_rows():
    first, again, other = (
        measure_scheme(SCHEMES[-1], setup, draw_workload(setup))
        for setup in (MemorySetup(num_requests=150, seed=seed) for seed in (3, 3, 4))
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_requests": 0}, "num_requests must be a positive integer"),
        ({"block_size": -1}, "block_size must be a positive integer"),
        ({"num_slots": 4095}, "does not hold two contexts of 2048"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(values, expected):
    with pytest.raises(ConfigError, match=expected):
        MemorySetup(**values)


def test_a_pool_that_is_never_short_is_refused():
    setup = MemorySetup(num_requests=20)
    with pytest.raises(ConfigError, match="raise num_requests or lower num_slots"):
        compare_memory(setup, draw_workload(setup))


def test_the_command_prints_the_table_and_draws_it(capsys, tmp_path):
    picture = tmp_path / "memory.png"
    assert main(["bench", "memory", *SMALL, "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("60 requests of sharegpt lengths")
    names = [line[:24].strip() for line in lines[4:]]
    assert names[::2] == [scheme.name for scheme in SCHEMES]
    assert names[1::2] == [f"paper: {scheme.published.system}" for scheme in SCHEMES]
    for line in lines[4::2]:
        shares = [float(cell) for cell in line.split()[1:5]]
        assert sum(shares) == pytest.approx(100, abs=0.3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_figure_2_is_not_shown_beside_another_workload(capsys):
    assert main(["bench", "memory", *SMALL, "--workload", "alpaca", "--num-requests", "100"]) == 0
    paper = [line for line in capsys.readouterr().out.splitlines() if "Orca (Max)" in line]
    assert paper[0].split() == ["paper:", "Orca", "(Max)", "7.00"]


def test_a_picture_that_cannot_be_drawn_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "memory", *SMALL, "--plot", str(tmp_path / "memory.png")]) == 1
    assert "octavo[plot]" in capsys.readouterr().err


def test_the_comparison_needs_no_torch():
    code = "import octavo.bench.memory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
