"""The picture of `octavo plan --plot`. The only module that needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.cli.plan import Segment

GIB = 2**30
# One family of colours for each group; weights get a shade for each kind.
COLOURS = {
    "others": ("#9a9a9a",),
    "weights": ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1"),
    "activations": ("#d94801", "#fdae6b", "#fdd0a2"),
    "rows": ("#6a51a3",),
    "KV cache": ("#238b45",),
    "not used": ("#ededed",),
}


def draw_plan(parts: "list[Segment]", title: str, path: Path) -> None:
    """Write one stacked bar of the device's memory; the ending of `path` says the format.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which the extra 'plot' brings: pip install 'octavo[plot]'"
        ) from error
    figure = Figure(figsize=(9.0, 3.2))
    axes = figure.add_axes((0.03, 0.5, 0.94, 0.36))
    left, shades = 0.0, {group: iter(colours) for group, colours in COLOURS.items()}
    for part in parts:
        width = part.num_bytes / GIB
        label = f"{part.name}, {width:.2f} GiB"
        colour = next(shades[part.group], COLOURS[part.group][-1])
        axes.barh(0, width, left=left, color=colour, edgecolor="white", linewidth=0.5, label=label)
        left += width
    axes.set_title(title, fontsize=10)
    axes.set_yticks([])
    axes.set_xlim(0, left)
    axes.set_xlabel("GiB")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error}") from error
