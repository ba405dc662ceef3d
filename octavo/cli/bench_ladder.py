"""`octavo bench ladder`: every rung of batching and of KV memory, on one trace."""

import argparse
import dataclasses
import sys
from pathlib import Path

from octavo.bench.ladder import RECIPE, SIZE, Climbed, LadderSizes, as_markdown, climb, draw_ladder
from octavo.cli.flags import add_dataclass, collect
from octavo.cli.sim import add_output_flags, add_steps_flag, describe_steps, load_recorded
from octavo.sim.replay import Machine, ReplaySetup, SimulatedMachine
from octavo.sim.report import ServiceLevel, write_json
from octavo.sim.step_time import read_step_times
from octavo.sim.workload import RECIPES, make_workload, read_trace

HELP = "replay one trace on every rung of batching and of KV memory, simulated or for real"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="the requests, as `octavo trace` makes them; default: "
        f"{SIZE.num_requests} of {RECIPE!r}, {SIZE.rate:g} a second, lengths times {SIZE.scale}",
    )
    add_steps_flag(parser)
    parser.add_argument(
        "--real",
        action="store_true",
        help="run the model whose steps were recorded, instead of simulating it",
    )
    add_output_flags(parser)
    add_dataclass(parser, LadderSizes, "engine")
    add_dataclass(parser, ServiceLevel, "service level")


def run(arguments: argparse.Namespace) -> int:
    """Climb, and print the table."""
    workload = make_workload(RECIPES[RECIPE], SIZE)
    if arguments.trace is not None:
        workload = read_trace(arguments.trace)
    times = read_step_times(arguments.steps)
    setup = ReplaySetup(**dataclasses.asdict(LadderSizes(**collect(arguments, LadderSizes))))
    machine: Machine = SimulatedMachine(times)
    if arguments.real:
        machine = load_recorded(times.recorded, setup)
    level = ServiceLevel(**collect(arguments, ServiceLevel))
    ladder = climb(workload, setup, machine, level=level, on_rung=_print_rung)
    print(
        ("The model itself. " if arguments.real else "Simulated: ") + describe_steps(times, setup)
    )
    print(as_markdown(ladder))
    if arguments.json is not None:
        write_json(arguments.json, {climbed.rung.name: climbed.metrics for climbed in ladder})
    if arguments.plot is not None:
        draw_ladder(arguments.plot, ladder)
    return 0


def _print_rung(climbed: Climbed) -> None:
    """A sign of life after each rung."""
    metrics = climbed.metrics
    print(
        f"{climbed.rung.name}: {metrics.output_tokens_per_s:.1f} tok/s, {metrics.duration_s:.1f} s",
        file=sys.stderr,
        flush=True,
    )
