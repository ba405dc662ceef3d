"""The stacked bars of PagedAttention's figure 2, for a memory comparison of ours."""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from octavo.bench.memory import MemoryRow
from octavo.sim.report import import_pyplot, save

CATEGORIES = {  # with their colours, from the bottom up
    "token states": "#2a6f97",
    "reservation": "#a9d6e5",
    "internal fragmentation": "#f4a259",
    "external and others": "#d9d9d9",
}
BAR_WIDTH = 0.4
PAPER_OFFSET = 0.42  # from the middle of our bar to that of the paper's
MIN_LABELLED_PERCENT = 3.0


def plot_memory(rows: SequenceOf[MemoryRow], path: Path, *, with_paper: bool) -> None:
    """Write the picture; with the paper's bars beside ours where they are of the same workload.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    labels: dict[float, str] = {}
    for index, row in enumerate(rows):
        _draw_bar(
            axes, index, [100 * x for x in (row.used, row.reserved, row.internal, row.others)]
        )
        labels[index] = row.scheme.name.replace("-", "-\n")
        if with_paper:
            _draw_bar(axes, index + PAPER_OFFSET, row.scheme.published.percent)
            labels[index + PAPER_OFFSET] = f"paper:\n{row.scheme.published.system}"
    axes.set_xticks(list(labels), list(labels.values()), fontsize=8)
    axes.set_ylabel("share of the KV pool (%)")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in CATEGORIES.values()]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(handles, list(CATEGORIES), ncols=len(CATEGORIES), frameon=False, **place)
    try:
        save(figure, path)
    finally:
        pyplot.close(figure)


def _draw_bar(axes: Any, x: float, percent: SequenceOf[float | None]) -> None:
    """One bar, from the bottom up; None is a share that nobody published."""
    bottom = 0.0
    for share, (category, color) in zip(percent, CATEGORIES.items(), strict=True):
        if share is None:
            continue
        axes.bar(x, share, BAR_WIDTH, bottom=bottom, color=color, edgecolor="white")
        if share >= MIN_LABELLED_PERCENT:
            ink = "white" if category == "token states" else "black"
            place = {"ha": "center", "va": "center", "fontsize": 8, "color": ink}
            axes.text(x, bottom + share / 2, f"{share:.1f}", **place)
        bottom += share
