"""All GPU workloads beside the peer's figures: `python benchmarks/gpu.py`, on one H100.

For each shape: the offline workloads on one engine, in the order in which the peer ran them; one of
them again on a batch-invariant engine; starts with cold and warm kernel caches; a server under
load. Each part has processes of its own, one after the other, so that none finds the device in use.
Weights are random, prompts are random token ids.
Writes benchmarks/results/h100.json after each part: a list of rows, for `octavo bench report`. What
they are compared with, and which rows there are, is in benchmarks/peers_h100.json.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

import octavo
from octavo.bench.report import (
    Goal,
    Header,
    Row,
    as_markdown,
    make_row,
    merge_rows,
    read_rows,
    shown,
    write_rows,
)
from octavo.bench.serve import Load, ServeSetup, measure_load
from octavo.bench.server_process import running_server
from octavo.bench.startup import StartupSetup, measure_startup
from octavo.bench.suite import Figure, SuiteOrder
from octavo.cli.flags import add_dataclass, engine_values
from octavo.config import GROUPS
from octavo.errors import OctavoError

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "h100.json"
PEERS = HERE / "peers_h100.json"
SHAPES = HERE / "shapes"
CARD = "H100"  # what RESULTS is of
TABLE_START, TABLE_END = "<!-- made by benchmarks/gpu.py -->\n", "<!-- end of table -->"

# As the peer was run; flags of the command line replace them.
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 9216,
    "gpu_memory_utilization": 0.9,
    "enable_prefix_caching": False,
}
BATCH_INVARIANT = " batch-invariant"  # how names end of workloads that run on such an engine
# Parts end by these shares of the time for a shape, unless even one run of each takes longer.
OFFLINE_SHARE, BATCH_INVARIANT_SHARE, STARTUP_SHARE = 0.5, 0.62, 0.75
# A first load that does not count, as the first run of offline workloads does not.
WARM_UP = ServeSetup(num_prompts=32, seed=2)
WARM_UP_RATE = 16.0

# --smoke: whether everything runs, on whatever device there is.
SMALL_SHAPE = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_OPTIONS = {"max_model_len": 1024}
SMALL_DIVISOR = 32


@dataclass(frozen=True)
class Run:
    """One shape on its way through all parts."""

    shape: str
    model: Path
    options: dict[str, Any]
    goals: list[Goal]  # of this shape, and wanted
    repeats: int
    end_s: float  # of the clock, for all parts together
    begun_s: float = field(default_factory=time.monotonic)
    smoke: bool = False

    def wants(self, part: str) -> list[str]:
        """Wanted workloads of a part."""
        names = dict.fromkeys(goal.workload for goal in self.goals)
        return [name for name in names if part_of(name) == part]

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over."""
        return self.begun_s + share * (self.end_s - self.begun_s) - time.monotonic()


def part_of(workload: str) -> str:
    """The part that measures a workload, and no other does: the name of its function."""
    if workload.endswith(BATCH_INVARIANT):
        return "batch_invariant"
    kind = workload.split()[0]
    return kind if kind in ("startup", "serve") else "offline"


Values = dict[tuple[str, str], list[float]]  # of each run, by (workload, metric)


def offline(run: Run, values: Values) -> None:
    """The suite; the first value of each list is of the run that found all cold."""
    names = run.wants("offline")
    for figure in suite_figures(run, run.options, names, end_share=OFFLINE_SHARE):
        note(values, figure.workload, figure.metric, figure.value)


def batch_invariant(run: Run, values: Values) -> None:
    """What it costs that logits have the same bits in any batch: the same work as without."""
    options = run.options | {"determinism": "batch-invariant"}
    names = [name.removesuffix(BATCH_INVARIANT) for name in run.wants("batch_invariant")]
    for figure in suite_figures(run, options, names, end_share=BATCH_INVARIANT_SHARE):
        note(values, figure.workload + BATCH_INVARIANT, figure.metric, figure.value)


def suite_figures(
    run: Run, options: dict[str, Any], names: list[str], *, end_share: float
) -> Iterator[Figure]:
    """The suite's figures, from a child, as they come.

    Raises:
        OctavoError: the child failed, after what it had measured by then.
    """
    order = SuiteOrder(
        model=str(run.model),
        options=options,
        only=names,
        repeats=run.repeats,
        budget_s=run.left_s(end_share),
        divisor=SMALL_DIVISOR if run.smoke else 1,
    )
    command = [sys.executable, "-m", "octavo.bench.suite"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(order))
        child.stdin.close()
        for line in child.stdout:
            if line.startswith(b"{"):
                yield msgspec.json.decode(line, type=Figure)
    if child.returncode:
        raise OctavoError(f"the offline workloads ended with code {child.returncode}")


def note(values: Values, workload: str, metric: str, value: float) -> None:
    """Keep a value, and show it."""
    values.setdefault((workload, metric), []).append(value)
    print(f"  {workload:<28}{metric:<14}{shown(value):>12}", flush=True)


def startup(run: Run, values: Values) -> None:
    """Starts with cold caches and with warm ones, as many of both as there is time for."""
    count, took_s = 1, 0.0
    while count > 0:
        begun_s = time.monotonic()
        cold = count if "startup cold" in run.wants("startup") and not run.smoke else 0
        for start in measure_startup(
            str(run.model),
            run.options,
            StartupSetup(num_iters_cold=cold, num_iters_warm=count),
        ):
            note(values, f"startup {start.cache}", "first token", start.first_token_s)
        if took_s:
            break
        took_s = time.monotonic() - begun_s
        count = min(run.repeats - 1, int(run.left_s(STARTUP_SHARE) / took_s))


def serve(run: Run, values: Values) -> None:
    """All rates on one server, again for as long as there is time."""
    setup, warm_up = ServeSetup(), WARM_UP
    if run.smoke:
        small = {"random_input_len": 16, "random_output_len": 4, "max_token_id": 511}
        setup = ServeSetup(seconds=1.0, num_prompts=8, **small)
        warm_up = setup
    with running_server(str(run.model), run.options) as url:
        name = run.model.resolve().name
        measure_load(url, name, warm_up, WARM_UP_RATE)
        took_s = 0.0
        for index in range(run.repeats):
            if index > 0 and run.left_s() < took_s:
                break
            begun_s = time.monotonic()
            for workload in run.wants("serve"):
                rate = float(workload.removeprefix("serve "))
                for metric, value in metrics_of(measure_load(url, name, setup, rate)):
                    note(values, workload, metric, value)
            took_s = time.monotonic() - begun_s


def metrics_of(load: Load) -> Iterator[tuple[str, float]]:
    """A load's figures by the names of metrics."""
    for name, spread in (("TTFT", load.ttft_ms), ("TPOT", load.tpot_ms), ("ITL", load.itl_ms)):
        for percentile, value in msgspec.structs.asdict(spread).items():
            yield f"{name} {percentile}", value
    yield "throughput", load.output_tokens_per_s


def rows_of(values: Values, run: Run, header: Header, *, first_counts: bool) -> list[Row]:
    """A row for each goal that was measured; the first run counts only where it is the only one."""
    rows = []
    for goal in run.goals:
        found = values.get((goal.workload, goal.metric), [])
        if first_counts or len(found) == 1:
            first, counted = None, found
        else:
            first, counted = next(iter(found), None), found[1:]
        if counted:
            rows.append(make_row(goal, counted, header, first=first))
    return rows


def run_shape(run: Run, header: Header, output: Path, order: Sequence[Goal]) -> bool:
    """All parts that are wanted, each saved when it is over; False where one of them failed.

    What was measured before a failure is as good as any other figure.
    """
    succeeded = True
    parts = ((offline, False), (batch_invariant, False), (startup, True), (serve, True))
    for part, first_counts in parts:
        if not run.wants(part.__name__):
            continue
        print(f"{run.shape}, {part.__name__}:", flush=True)
        values: Values = {}
        try:
            part(run, values)
        except OctavoError as error:
            print(f"{part.__name__} failed: {error}", file=sys.stderr, flush=True)
            succeeded = False
        new = rows_of(values, run, header, first_counts=first_counts)
        base = output if output.exists() or run.smoke else RESULTS
        old = read_rows(base) if base.exists() else []
        write_rows(output, merge_rows(old, new, order))
    print(f"{run.shape}: {time.monotonic() - run.begun_s:.0f} s in all", flush=True)
    return succeeded


def read_goals() -> tuple[str, list[Goal]]:
    """The peer's name, and all rows that there are to measure."""
    document = json.loads(PEERS.read_text())
    return document["peer_name"], msgspec.convert(document["goals"], list[Goal])


def is_wanted(goal: Goal, only: Sequence[str]) -> bool:
    """Whether --only names the workload, or words that it begins with."""
    return not only or any(f"{goal.workload} ".startswith(f"{name} ") for name in only)


def make_header(peer_name: str, commit: str | None) -> Header:
    """Where the rows are taken."""
    return Header(
        commit=commit or _first_line("git", "-C", str(HERE), "describe", "--always", "--dirty"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=_first_line(
            "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
        ),
        versions={
            "octavo": octavo.__version__,
            "torch": _version("torch"),
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        peer_name=peer_name,
        command=shlex.join(["python", "benchmarks/gpu.py", *_without_output(sys.argv[1:])]),
    )


def _without_output(arguments: list[str]) -> list[str]:
    """Where the file went says nothing about the figures in it."""
    kept = list(arguments)
    if "--output" in kept:
        place = kept.index("--output")
        del kept[place : place + 2]
    return kept


def _first_line(*command: str) -> str:
    """What a program says; "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def small_shape(shape: str, folder: Path) -> Path:
    """The config of a shape with two small layers."""
    config = json.loads((SHAPES / shape / "config.json").read_text())
    (folder / shape).mkdir()
    (folder / shape / "config.json").write_text(json.dumps(config | SMALL_SHAPE))
    return folder / shape


def without_peers(goal: Goal) -> Goal:
    """The same row, compared with nothing: what a tiny shape does says nothing."""
    nothing = dict.fromkeys(("peer", "roofline", "target", "stretch"))
    return msgspec.structs.replace(goal, shape=f"{goal.shape}, tiny", **nothing)


def readme_section() -> str:
    """What stands between the marks in the README."""
    if not RESULTS.exists():
        return "No figures are committed yet.\n"
    return as_markdown(read_rows(RESULTS))


def update_readme() -> None:
    """Put the table into the README, between its marks."""
    before, _, rest = README.read_text().partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    README.write_text(before + TABLE_START + readme_section() + TABLE_END + after)


def parse_arguments(goals: Sequence[Goal]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = list(dict.fromkeys(goal.shape for goal in goals))
    workloads = list(dict.fromkeys(goal.workload for goal in goals))
    parser.add_argument("--shape", nargs="+", choices=shapes, default=shapes)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORKLOAD",
        help="names or their first words: decode takes all of decode bs1, decode bs32 and so on; "
        f"there are: {', '.join(workloads)}",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs that count, at most")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no repeat is begun that would end after these"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the code; default: what git says")
    parser.add_argument("--table-only", action="store_true", help="only write the README's table")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes and lengths, to see that all of it runs"
    )
    for title, kind in GROUPS.items():
        add_dataclass(parser, kind, title)
    arguments = parser.parse_args()
    known = [goal.workload for goal in goals]
    for name in arguments.only:
        if not any(f"{workload} ".startswith(f"{name} ") for workload in known):
            parser.error(f"no workload {name!r}")
    return arguments


def main() -> None:
    peer_name, goals = read_goals()
    arguments = parse_arguments(goals)
    if arguments.table_only:
        update_readme()
        return
    header = make_header(peer_name, arguments.commit)
    if arguments.output == RESULTS and (arguments.smoke or CARD not in header.hardware):
        raise SystemExit(f"{RESULTS.name} is of an {CARD}: choose another file with --output")
    succeeded = True
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shape:
            wanted = [g for g in goals if g.shape == shape and is_wanted(g, arguments.only)]
            if not wanted:
                continue
            small: dict[str, Any] = {}
            if arguments.smoke:
                small, wanted = SMALL_OPTIONS, [without_peers(goal) for goal in wanted]
            run = Run(
                shape=shape,
                model=small_shape(shape, Path(folder)) if arguments.smoke else SHAPES / shape,
                options=OPTIONS | small | engine_values(arguments),
                goals=wanted,
                repeats=arguments.repeats,
                end_s=time.monotonic() + 60 * arguments.minutes,
                smoke=arguments.smoke,
            )
            succeeded &= run_shape(run, header, arguments.output, goals)
    print(as_markdown(read_rows(arguments.output)))
    if not succeeded:
        raise SystemExit("not all of it could be measured; the errors are above")


if __name__ == "__main__":
    main()
