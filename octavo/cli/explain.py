"""`octavo explain`: what an engine would be made of, without loading weights.

Either every resolved value and where it came from, or every layer's kernels and why not others.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.cli.flags import add_engine_flags, engine_options
from octavo.config import Setting, locate, read_model_config, resolve

if TYPE_CHECKING:  # it imports torch
    from octavo.layers import KernelReport

HELP = "print every setting of an engine, or every layer's kernels, and where each comes from"

# The number of a layer within its model, in the name of a module: blocks.7.attention.qkv
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="which kernel each layer gets on this device, and why others were passed over",
    )
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print one of the tables."""
    from octavo.runner import device_facts  # imports torch, which only sees the devices here

    options = engine_options(arguments)
    checkpoint = locate(options.model, weights=False)
    facts = device_facts(options.device.device)
    model_config = read_model_config(checkpoint, options.loading.model_impl)
    config = resolve(options, model_config, facts)
    if arguments.kernels:
        from octavo.models.weightless import kernel_reports

        print(f"{checkpoint.name} on {facts.name}, {config.dtype}\n")
        print(kernel_table(kernel_reports(config)))
        return 0
    print(f"{checkpoint.name} on {facts.name}\n")
    print(as_table(config.settings))
    return 0


def as_table(settings: tuple[Setting, ...]) -> str:
    """Aligned columns: name, value, source, reason."""
    rows: list[tuple[str, ...]] = [("setting", "value", "source", "why")]
    rows += [(s.name, str(s.value), s.source, s.why) for s in settings]
    return _aligned(rows)


def kernel_table(reports: Sequence[KernelReport]) -> str:
    """One row for all layers that differ in their number alone: names, op, kernel, and why."""
    numbers: dict[tuple[str, str, str, str], list[int]] = {}
    for report in reports:
        found = NUMBER.search(report.layer)
        name = NUMBER.sub("{}", report.layer, count=1)
        why = "; ".join(f"not {other}: {why}" for other, why in report.choice.passed_over)
        row = (name, report.choice.op, report.choice.name, why)
        numbers.setdefault(row, []).extend([int(found[0])] if found else [])
    rows: list[tuple[str, ...]] = [("layer", "op", "kernel", "why")]
    rows += [(name.format(ranges(of)), *rest) for (name, *rest), of in numbers.items()]
    return _aligned(rows)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, shortened: 0..3,5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("..".join(map(str, run)) for run in runs)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the last one ends where it ends."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for *cells, last in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, last]).rstrip())
    return "\n".join(lines)
