"""Measured rows beside a peer's: as a table in Markdown, and as bars.

Owns the form of a results file, a list of rows, and what "met" means. Knows no engine, and no peer
but the one that the rows name.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from octavo.errors import ConfigError
from octavo.sim.report import import_pyplot, save

SERVE = "serve "  # and a rate: the names of workloads on a server
OURS, PEERS, ROOF = "#2a6f97", "#c9c9c9", "#d1495b"  # colours of bars and of the roofline's mark
BAR_HEIGHT = 0.38
ROW_INCHES = 0.36  # of a panel's height, for each row
MAX_RATIO_SHOWN_LINEAR = 20.0  # panels whose values differ by more have a logarithmic axis


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What one figure is compared with. None where nobody has measured or computed it.

    peer: what the peer reached; roofline: what the hardware allows; target, stretch: what we want.
    """

    shape: str
    workload: str
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    peer: float | None = None
    roofline: float | None = None
    target: float | None = None
    stretch: float | None = None


class Row(Goal, frozen=True, kw_only=True):
    """One figure of ours beside its goal: the median of some runs, and where it was taken.

    first: the run that found caches cold, which does not count where others followed.
    """

    value: float
    min: float
    max: float
    num_runs: int
    first: float | None = None
    commit: str
    date: str
    hardware: str
    versions: dict[str, str]
    peer_name: str
    command: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What is one row of a results file."""
        return self.shape, self.workload, self.metric

    @property
    def ratio(self) -> float | None:
        """Our advantage over the peer: above 1, Octavo is ahead."""
        if self.peer is None or not self.value:
            return None
        return self.value / self.peer if self.better == "higher" else self.peer / self.value

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None where there is none.

        Where the target is the peer's own figure, it is to be better than that.
        """
        if self.target is None or self.value == self.target == self.peer:
            return None if self.target is None else False
        if self.better == "higher":
            return self.value >= self.target
        return self.value <= self.target


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Where and of what rows are taken; the same for all rows of one run."""

    commit: str
    date: str
    hardware: str
    versions: dict[str, str]
    peer_name: str
    command: str


def make_row(
    goal: Goal, values: Sequence[float], header: Header, *, first: float | None = None
) -> Row:
    """The median of the values, and everything else that a row holds."""
    return Row(
        **msgspec.structs.asdict(goal),
        **msgspec.structs.asdict(header),
        value=shorten(statistics.median(values)),
        min=shorten(min(values)),
        max=shorten(max(values)),
        num_runs=len(values),
        first=None if first is None else shorten(first),
    )


def shorten(value: float) -> float:
    """Four digits; what lies behind is noise."""
    return float(f"{value:.4g}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; raises `ConfigError` where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Row])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} holds no rows of results: {error}") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a results file, a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")


def merge_rows(old: Sequence[Row], new: Sequence[Row], order: Sequence[Goal]) -> list[Row]:
    """Old rows with new ones in their places, in the order of the goals."""
    merged = {row.key: row for row in (*old, *new)}
    places = {(goal.shape, goal.workload, goal.metric): i for i, goal in enumerate(order)}
    return sorted(merged.values(), key=lambda row: places.get(row.key, len(places)))


def as_markdown(rows: Sequence[Row]) -> str:
    """What was measured where, and a line for each row."""
    taken = dict.fromkeys((row.shape, row.hardware, row.commit, row.date[:10]) for row in rows)
    lines = [
        f"{shape}: {hardware}, commit {commit}, {date}." for shape, hardware, commit, date in taken
    ]
    peers = " and ".join(dict.fromkeys(row.peer_name for row in rows))
    lines += [
        "",
        f"| shape | workload | unit | {peers} | roofline | target | Octavo | ratio | met |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [
            row.shape,
            label_of(row),
            row.unit,
            shown(row.peer),
            shown(row.roofline),
            ("≥ " if row.better == "higher" else "≤ ") + shown(row.target) if row.target else "–",
            shown(row.value),
            "–" if row.ratio is None else f"{row.ratio:.2f}×",
            {None: "–", True: "yes", False: "**no**"}[row.is_met],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    num_targets = sum(row.is_met is not None for row in rows)
    num_met = sum(row.is_met is True for row in rows)
    lines += ["", f"{num_met} of {num_targets} targets are met. A ratio above 1: Octavo is ahead."]
    return "\n".join(lines) + "\n"


def label_of(row: Row) -> str:
    """The workload, with the metric where there are several of it."""
    name = row.workload
    if name.startswith(SERVE):
        name = "serve all at once" if name == f"{SERVE}inf" else f"{name} req/s"
    return name if row.metric == "throughput" else f"{name}, {row.metric}"


def shown(value: float | None) -> str:
    """A figure with as many digits as it deserves."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw_rows(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each kind of unit: our bars and the peer's, the roofline as a mark.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = import_pyplot()
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(panel_of(row), []).append(row)
    heights = [len(panel) + 1.5 for panel in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, ROW_INCHES * sum(heights) + 1),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for one, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_panel(one, title, panel)
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (OURS, PEERS, ROOF)]
    names = ["Octavo", rows[0].peer_name, "roofline"]
    figure.legend(marks, names, loc="upper right", ncols=3, frameon=False)
    try:
        save(figure, path)
    finally:
        pyplot.close(figure)


def panel_of(row: Row) -> str:
    """Rows of one panel can be compared by eye: one unit, and either a server's or an engine's."""
    where = "serving, " if row.workload.startswith(SERVE) else ""
    return f"{where}{row.unit} ({row.better} is better)"


def _draw_panel(axes: Any, title: str, rows: Sequence[Row]) -> None:
    known = [x for row in rows for x in (row.value, row.peer, row.roofline) if x]
    for index, row in enumerate(rows):
        axes.barh(index - BAR_HEIGHT / 2, row.value, BAR_HEIGHT, color=OURS)
        axes.text(row.value, index - BAR_HEIGHT / 2, f" {shown(row.value)}", va="center", size=7)
        if row.peer is not None:
            axes.barh(index + BAR_HEIGHT / 2, row.peer, BAR_HEIGHT, color=PEERS)
            axes.text(row.peer, index + BAR_HEIGHT / 2, f" {shown(row.peer)}", va="center", size=7)
        if row.roofline is not None:
            axes.vlines(row.roofline, index - BAR_HEIGHT, index + BAR_HEIGHT, color=ROOF, lw=2)
    axes.set_yticks(range(len(rows)), [f"{row.shape}: {label_of(row)}" for row in rows], size=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # downwards
    axes.set_title(title, size=9, loc="left")
    if known and max(known) / min(known) > MAX_RATIO_SHOWN_LINEAR:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(min(known))), 2 * max(known))
    elif known:
        axes.set_xlim(0, 1.15 * max(known))
    axes.spines[["top", "right"]].set_visible(False)
