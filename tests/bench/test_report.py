"""Rows beside a peer's: ratio, met or missed, the table, the bars, and the README."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import octavo
from octavo.bench.report import (
    Goal,
    Header,
    as_markdown,
    make_row,
    merge_rows,
    panel_of,
    read_rows,
    write_rows,
)
from octavo.bench.suite import Figure, peer_workloads
from octavo.cli import main
from octavo.errors import ConfigError, OctavoError

ROOT = Path(octavo.__file__).parents[1]
HEADER = Header(
    commit="abc1234",
    date="2026-01-02T03:04:05+00:00",
    hardware="a card",
    versions={"torch": "2"},
    peer_name="Peer 1",
    command="python benchmarks/gpu.py",
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def row(*values, **changes):
    goal = {
        "shape": "s",
        "workload": "w",
        "metric": "throughput",
        "unit": "output tok/s",
        "better": "higher",
        "peer": 100.0,
        "roofline": 300.0,
        "target": 110.0,
    }
    return make_row(Goal(**goal | changes), values or [120.0], HEADER)


LOWER = {"better": "lower", "unit": "ms", "metric": "TBT"}


def test_a_row_is_the_median_with_its_spread():
    one = row(3.0, 1.0, 2.00012)
    assert (one.value, one.min, one.max, one.num_runs) == (2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize(
    ("value", "changes", "ratio", "met"),
    [
        (120, {}, 1.2, True),
        (110, {}, 1.1, True),
        (105, {}, 1.05, False),
        (80, LOWER | {"target": 90.0}, 1.25, True),
        (95, LOWER | {"target": 90.0}, 100 / 95, False),
        (100, LOWER | {"target": 100.0}, 1.0, False),  # better than the peer is what was wanted
        (99, LOWER | {"target": 100.0}, 100 / 99, True),
        (7, {"peer": None, "target": None}, None, None),
    ],
)
def test_ratio_and_target_know_which_way_is_better(value, changes, ratio, met):
    one = row(float(value), **changes)
    assert one.ratio == (None if ratio is None else pytest.approx(ratio))
    assert one.is_met is met


def test_the_table_says_all(tmp_path):
    text = as_markdown([row(), row(95.0, **LOWER, target=90.0), row(5.0, peer=None, target=None)])
    assert "s: a card, commit abc1234, 2026-01-02." in text
    assert "| s | w | output tok/s | 100 | 300 | ≥ 110 | 120 | 1.20× | yes |" in text
    assert "| s | w, TBT | ms | 100 | 300 | ≤ 90 | 95 | 1.05× | **no** |" in text
    assert "| serve 4 req/s |" in as_markdown([row(workload="serve 4")])
    assert "| serve all at once, TBT |" in as_markdown([row(**LOWER, workload="serve inf")])
    assert "| s | w | output tok/s | – | 300 | – | 5 | – | – |" in text
    assert "1 of 2 targets are met" in text


def test_rows_are_kept_replaced_and_put_in_order():
    old = [row(1.0, shape="b"), row(1.0, shape="a")]
    new = [row(2.0, shape="b"), row(2.0, shape="c")]
    order = [row(shape=shape) for shape in "abc"]
    merged = merge_rows(old, new, order)
    assert [(r.shape, r.value) for r in merged] == [("a", 1.0), ("b", 2.0), ("c", 2.0)]


def test_a_report_is_written_and_drawn(tmp_path, capsys):
    results = tmp_path / "h100.json"
    rows = [row(), row(5.0, **LOWER), row(5e4, **LOWER, workload="serve 4", roofline=None)]
    write_rows(results, rows)
    assert read_rows(results) == rows
    assert isinstance(json.loads(results.read_text()), list)
    assert main(["bench", "report", str(results), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == as_markdown(rows)
    assert (tmp_path / "out" / "h100.md").read_text() == as_markdown(rows)
    assert (tmp_path / "out" / "h100.png").read_bytes().startswith(b"\x89PNG")
    assert len({panel_of(r) for r in rows}) == 3


@pytest.mark.parametrize("content", [None, "{}", "[1]", '[{"shape": "s"}]'])
def test_what_is_no_results_file_is_refused(tmp_path, content):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="holds no rows"):
        read_rows(file)
    assert main(["bench", "report", str(file)]) == 1


# --- benchmarks/gpu.py ----------------------------------------------------------------------------


def test_the_goals_are_sound(gpu):
    peer, goals = gpu.read_goals()
    assert peer == "vLLM 0.26.0"
    keys = [(goal.shape, goal.workload, goal.metric) for goal in goals]
    assert len(set(keys)) == len(keys)
    for goal in goals:
        assert (gpu.SHAPES / goal.shape / "config.json").is_file()
        sign = 1 if goal.better == "higher" else -1
        ladder = [goal.peer, goal.target, goal.stretch, goal.roofline]
        known = [sign * value for value in ladder if value is not None]
        assert known == sorted(known), goal


def test_only_takes_names_or_their_first_words(gpu):
    _, goals = gpu.read_goals()

    def names(*only):
        return {goal.workload for goal in goals if gpu.is_wanted(goal, only)}

    assert names("decode bs1") == {"decode bs1"}
    assert names("decode") == {"decode bs1", "decode bs32", "decode bs64", "decode bs128"}
    assert len(names("serve")) == 5
    assert names("offline256", "startup cold") == {
        "offline256",
        "offline256 batch-invariant",
        "startup cold",
    }
    assert names("offline256 batch-invariant") == {"offline256 batch-invariant"}


def test_each_workload_is_measured_by_one_part(gpu):
    _, goals = gpu.read_goals()
    run = gpu.Run(shape="s", model=Path(), options={}, goals=goals, repeats=1, end_s=0.0)
    found = {part: run.wants(part) for part in ("offline", "batch_invariant", "startup", "serve")}
    names = sum(found.values(), [])
    assert len(set(names)) == len(names)
    assert set(names) == {goal.workload for goal in goals}
    assert found["batch_invariant"] == ["offline256 batch-invariant"]
    assert found["offline"] == [workload.name for workload in peer_workloads(512)[1]]


def test_batch_invariance_costs_a_row_and_an_engine_of_its_own(gpu, monkeypatch, tmp_path):
    asked = []

    def suite_figures(run, options, names, *, end_share):
        asked.append((options, names))
        for name in names:
            yield Figure(workload=name, metric="throughput", run=0, value=float(len(asked)))

    monkeypatch.setattr(gpu, "suite_figures", suite_figures)
    _, goals = gpu.read_goals()
    shape = goals[0].shape
    wanted = [g for g in goals if g.shape == shape and gpu.is_wanted(g, ["offline256"])]
    options = {"dtype": "bfloat16"}
    run = gpu.Run(shape=shape, model=Path(), options=options, goals=wanted, repeats=1, end_s=0.0)
    output = tmp_path / "rows.json"
    write_rows(output, [])
    assert gpu.run_shape(run, HEADER, output, goals)
    assert asked == [
        (options, ["offline256"]),
        (options | {"determinism": "batch-invariant"}, ["offline256"]),
    ]
    plain, invariant = read_rows(output)
    assert (plain.workload, plain.value) == ("offline256", 1.0)
    assert (invariant.workload, invariant.value) == ("offline256 batch-invariant", 2.0)
    assert invariant.ratio is None and invariant.is_met is None
    assert invariant.roofline == plain.roofline


def test_the_first_run_counts_only_where_it_is_alone(gpu):
    _, goals = gpu.read_goals()
    goal = goals[0]
    run = gpu.Run(shape=goal.shape, model=Path(), options={}, goals=[goal], repeats=3, end_s=0.0)
    key = (goal.workload, goal.metric)
    (one,) = gpu.rows_of({key: [9.0, 1.0, 2.0, 3.0]}, run, HEADER, first_counts=False)
    assert (one.value, one.max, one.first, one.num_runs) == (2.0, 3.0, 9.0, 3)
    (one,) = gpu.rows_of({key: [9.0]}, run, HEADER, first_counts=False)
    assert (one.value, one.first) == (9.0, None)
    (one,) = gpu.rows_of({key: [9.0, 1.0, 2.0]}, run, HEADER, first_counts=True)
    assert (one.value, one.num_runs) == (2.0, 3)
    assert gpu.rows_of({}, run, HEADER, first_counts=False) == []


@pytest.mark.server
def test_one_command_runs_all_parts(gpu, tmp_path):
    output = tmp_path / "rows.json"
    kept = row(shape="another")
    write_rows(output, [kept])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke"]
    command += ["--shape", "llama-3.1-8b", "--output", str(output), "--repeats", "1"]
    only = ["decode bs1", "offline256 batch-invariant", "startup warm", "serve inf"]
    command += ["--only", *only, "--commit", "c0ffee"]
    command += ["--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", str(2**24)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = read_rows(output)
    assert {r.workload for r in rows} == {*only, "w"}
    assert kept in rows
    ours = [r for r in rows if r.shape == "llama-3.1-8b, tiny"]
    assert all(r.commit == "c0ffee" and r.peer is None and r.value > 0 for r in ours)
    assert next(r for r in ours if r.metric == "TBT").first is not None


def test_what_was_measured_before_a_failure_is_kept(gpu, tmp_path, monkeypatch, capsys):
    _, goals = gpu.read_goals()
    goal = goals[0]

    def offline(run, values):
        gpu.note(values, goal.workload, goal.metric, 5.0)
        raise OctavoError("out of memory")

    monkeypatch.setattr(gpu, "offline", offline)
    output = tmp_path / "rows.json"
    write_rows(output, [])
    run = gpu.Run(shape=goal.shape, model=Path(), options={}, goals=[goal], repeats=1, end_s=0.0)
    assert not gpu.run_shape(run, HEADER, output, goals)
    assert [r.value for r in read_rows(output)] == [5.0]
    assert "out of memory" in capsys.readouterr().err


def test_the_results_of_the_card_are_taken_on_it_only(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    with pytest.raises(SystemExit, match="choose another file"):
        gpu.main()


def test_the_readme_shows_the_committed_figures(gpu):
    text = (ROOT / "README.md").read_text()
    shown = text.split(gpu.TABLE_START)[1].split(gpu.TABLE_END)[0]
    assert shown == gpu.readme_section(), "run: python benchmarks/gpu.py --table-only"


def test_the_readme_is_filled_between_its_marks(gpu, tmp_path, monkeypatch):
    readme, results = tmp_path / "README.md", tmp_path / "h100.json"
    readme.write_text(f"before\n{gpu.TABLE_START}old\n{gpu.TABLE_END}\nafter\n")
    write_rows(results, [row()])
    monkeypatch.setattr(gpu, "README", readme)
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--table-only"])
    gpu.main()
    expected = f"before\n{gpu.TABLE_START}{as_markdown([row()])}{gpu.TABLE_END}\nafter\n"
    assert readme.read_text() == expected


def test_the_shapes_are_read_without_weights_or_tokenizer(gpu):
    config = json.loads((gpu.SHAPES / "llama-3.1-8b" / "config.json").read_text())
    assert config["hidden_size"] == 4096 and config["num_hidden_layers"] == 32
    config = json.loads((gpu.SHAPES / "qwen3-0.6b" / "config.json").read_text())
    assert config["hidden_size"] == 1024 and config["head_dim"] == 128
    assert msgspec.json.decode(gpu.PEERS.read_bytes())["source"]
