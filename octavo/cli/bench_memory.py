"""`octavo bench memory`: where KV memory goes under each allocator, beside the paper's figures."""

import argparse
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from octavo.bench.memory import MemoryRow, MemorySetup, compare_memory, draw_workload
from octavo.bench.memory_plot import plot_memory
from octavo.cli.flags import add_dataclass, collect

HELP = "compare how much KV memory each allocator wastes, as PagedAttention's figure 2 does"

COLUMNS = (
    "% of the pool",
    "token states",
    "reservation",
    "internal",
    "others",
    "= rounding",
    "+ external",
    "+ free",
    "running",
    "tokens/step",
)
PUBLISHED_PERCENT = "sharegpt"  # the workload of the paper's figure 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_dataclass(parser, MemorySetup, "comparison")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the comparison as stacked bars, to a PNG"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and draw it where that is wanted."""
    setup = MemorySetup(**collect(arguments, MemorySetup))
    workload = draw_workload(setup)
    rows = compare_memory(setup, workload)
    num_requests = len(workload.requests)
    num_prompt_tokens = sum(request.num_prompt_tokens for request in workload.requests)
    print(
        f"{num_requests} requests of {setup.workload} lengths: prompts of "
        f"{num_prompt_tokens / num_requests:.1f} tokens on average, outputs of "
        f"{workload.num_output_tokens / num_requests:.1f} (seed {setup.seed})\n"
        f"a pool of {setup.num_slots // setup.block_size} blocks of {setup.block_size} tokens, "
        f"contexts of at most {setup.max_model_len}\n"
    )
    print(as_table(rows, setup.workload))
    if arguments.plot is not None:
        plot_memory(rows, arguments.plot, with_paper=setup.workload == PUBLISHED_PERCENT)
    return 0


def as_table(rows: SequenceOf[MemoryRow], workload: str) -> str:
    """Two lines for each allocator: what was measured here, and what the paper published."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        shares = (row.used, row.reserved, row.internal, row.others)
        parts = (row.rounding, row.external, row.free)
        speed = row.num_tokens_per_step / rows[0].num_tokens_per_step
        percent = [f"{100 * share:.1f}" for share in (*shares, *parts)]
        lines.append((row.scheme.name, *percent, f"{row.num_running:.2f}", f"x {speed:.2f}"))
        paper = row.scheme.published
        known = paper.percent if workload == PUBLISHED_PERCENT else [None] * len(shares)
        percent = ["" if share is None else f"{share:.1f}" for share in known]
        running = f"{paper.num_running[workload]:.2f}"
        lines.append((f"  paper: {paper.system}", *percent, "", "", "", running, ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    )
