"""`octavo bench`: measurements of the engine and its parts, each a command of its own."""

import argparse
from types import ModuleType

from octavo.cli import (
    bench_ladder,
    bench_latency,
    bench_memory,
    bench_policies,
    bench_record,
    bench_report,
    bench_serve,
    bench_startup,
    bench_throughput,
)

HELP = "measure the engine and its parts"

BENCHES: dict[str, ModuleType] = {
    "throughput": bench_throughput,
    "latency": bench_latency,
    "serve": bench_serve,
    "startup": bench_startup,
    "report": bench_report,
    "record": bench_record,
    "ladder": bench_ladder,
    "memory": bench_memory,
    "policies": bench_policies,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each measurement."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, module in BENCHES.items():
        bench = benches.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_flags(bench)


def run(arguments: argparse.Namespace) -> int:
    """Run the measurement that was asked for."""
    status: int = BENCHES[arguments.bench].run(arguments)
    return status
