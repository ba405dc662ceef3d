"""`octavo bench report`: results of a comparison as a table and as bars."""

import argparse
from pathlib import Path

from octavo.bench.report import as_markdown, draw_rows, read_rows
from octavo.errors import ConfigError

HELP = "show results of benchmarks/gpu.py beside the peer's figures, as a table and as bars"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="a JSON file of rows")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write the table and the bars there, named after RESULTS; default: only print",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table; write it and draw."""
    rows = read_rows(arguments.results)
    if not rows:
        raise ConfigError(f"{arguments.results} holds no rows")
    table = as_markdown(rows)
    print(table, end="")
    if arguments.output is not None:
        stem = arguments.output / arguments.results.stem
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".md").write_text(table)
        except OSError as error:
            raise ConfigError(f"{arguments.output} cannot be written: {error}") from error
        draw_rows(stem.with_suffix(".png"), rows)
    return 0
