"""`octavo bench startup`: from the start of a process to the first token."""

import argparse
import statistics

from octavo.bench.startup import StartupSetup, measure_startup
from octavo.cli.bench_flags import add_bench_flags, bench_options, write_result
from octavo.cli.flags import add_dataclass, collect, engine_options

HELP = "measure the time from the start of a process to its first token, caches cold and warm"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_dataclass(parser, StartupSetup, "starts")
    add_bench_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Start, print the phases of the median start, and write all."""
    setup = StartupSetup(**collect(arguments, StartupSetup))
    engine_options(arguments)  # what is wrong with them is better said before anything starts
    starts = measure_startup(arguments.model, bench_options(arguments), setup)
    for cache in dict.fromkeys(start.cache for start in starts):
        same = sorted((s for s in starts if s.cache == cache), key=lambda s: s.first_token_s)
        middle = same[(len(same) - 1) // 2]
        ready_s = statistics.median(start.ready_s for start in same)
        print(
            f"{cache} caches, {len(same)} starts: first token after {middle.first_token_s:.2f} s "
            f"({same[0].first_token_s:.2f} to {same[-1].first_token_s:.2f}), ready after "
            f"{ready_s:.2f} s"
        )
        for name, seconds in middle.phases:
            print(f"  {name:<28}{seconds:>8.2f} s")
    write_result(arguments, setup, starts)
    return 0
