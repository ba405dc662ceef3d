"""What the benchmarks of whole engines share on the command line: the model, options, JSON."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec

from octavo import __version__
from octavo.cli.flags import add_dataclass, engine_values
from octavo.config import ALIASES, DEFAULT_MODEL, GROUPS
from octavo.errors import ConfigError

# Prompts are random ids, so text has no part in it; and a prefix that a run before left in the
# cache would make the next one another workload.
BENCH_DEFAULTS = {"enable_prefix_caching": False, "skip_tokenizer_init": True}


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --output-json, and flags of every engine option."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="an alias, a Hugging Face directory (of which config.json is enough with "
        f"--load-format dummy), a .gguf file or a hub id (default: {DEFAULT_MODEL}; aliases: "
        f"{', '.join(ALIASES)})",
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="write the result there, too"
    )
    for title, kind in GROUPS.items():
        add_dataclass(parser, kind, title)


def bench_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine options: those given as flags, over what benchmarks set by themselves."""
    return BENCH_DEFAULTS | engine_values(arguments)


def write_result(arguments: argparse.Namespace, setup: Any, result: Any) -> None:
    """What was run and what came of it, as JSON, where --output-json asks for it."""
    if arguments.output_json is None:
        return
    document = {
        "benchmark": arguments.bench,
        "octavo": __version__,
        "model": arguments.model,
        "engine_options": bench_options(arguments),
        "setup": dataclasses.asdict(setup),
        "result": msgspec.to_builtins(result),
    }
    try:
        arguments.output_json.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{arguments.output_json} cannot be written: {error}") from error
    print(f"written to {arguments.output_json}")


def print_table(rows: dict[str, str]) -> None:
    """One line for each name and value."""
    for name, value in rows.items():
        print(f"  {name:<28}{value:>14}")
