"""`octavo bench policies`: one trace of several tenants, simulated under each scheduling policy."""

import argparse
import dataclasses
from pathlib import Path

from octavo.bench.policies import (
    PolicySizes,
    as_markdown,
    compare_policies,
    draw_policies,
    overload,
)
from octavo.cli.flags import add_dataclass, collect
from octavo.cli.sim import add_steps_flag, describe_steps
from octavo.sim.replay import ReplaySetup, SimulatedMachine
from octavo.sim.step_time import read_step_times
from octavo.sim.workload import read_trace

HELP = "simulate one trace of several tenants under each scheduling policy"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="requests with tenants, priorities and deadlines; default: a batch job and two "
        "tenants who wait for their answers",
    )
    add_steps_flag(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg or .pdf)"
    )
    add_dataclass(parser, PolicySizes, "engine")


def run(arguments: argparse.Namespace) -> int:
    """Replay under each policy, print and draw."""
    times = read_step_times(arguments.steps)
    setup = ReplaySetup(**dataclasses.asdict(PolicySizes(**collect(arguments, PolicySizes))))
    machine = SimulatedMachine(times)
    given = arguments.trace
    workload = overload(setup, machine) if given is None else read_trace(given)
    parts = compare_policies(workload, setup, machine)
    print("Simulated: " + describe_steps(times, setup))
    print(as_markdown(parts))
    if arguments.plot is not None:
        draw_policies(arguments.plot, parts)
    return 0
