"""`octavo trace`: makes a trace of requests to replay."""

import argparse
import shlex
from pathlib import Path

from octavo.cli.flags import add_dataclass, collect, flag
from octavo.sim.workload import RECIPES, TraceSize, make_workload, write_trace

HELP = "make a trace of requests: lengths, arrivals and shared beginnings, but no text"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "recipe",
        choices=sorted(RECIPES),
        metavar="RECIPE",
        help="whose lengths the requests have, or groups of requests that begin alike",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines, one for each request"
    )
    add_dataclass(parser, TraceSize, "trace")


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    given = collect(arguments, TraceSize)
    flags = [f"{flag(name)} {shlex.quote(str(value))}" for name, value in given.items()]
    made_by = " ".join(["octavo trace", arguments.recipe, *flags])
    workload = make_workload(RECIPES[arguments.recipe], TraceSize(**given), made_by=made_by)
    write_trace(arguments.out, workload)
    count = len(workload.requests)
    num_prompt_tokens = sum(request.num_prompt_tokens for request in workload.requests)
    print(
        f"{arguments.out}: {count} requests in {workload.requests[-1].arrival_s:.1f} s; on average "
        f"{num_prompt_tokens / count:.1f} tokens in, {workload.num_output_tokens / count:.1f} out"
    )
    return 0
