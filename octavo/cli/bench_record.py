"""`octavo bench record`: how long steps of all kinds take with a model on this machine."""

import argparse
import dataclasses
from pathlib import Path

from octavo.cli.flags import add_dataclass, collect
from octavo.config import DEFAULT_MODEL, DeviceOptions, ModelOptions
from octavo.sim.replay import EngineSizes, ReplaySetup
from octavo.sim.step_time import StepTimes, default_path, write_step_times

HELP = "time a model's steps on this machine, so that `octavo sim` knows how long they take"

DTYPE = next(field for field in dataclasses.fields(ModelOptions) if field.name == "dtype")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"as in `octavo serve` (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write; default: <model>-<dtype>-<device>.json in the user's cache",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE.metadata["choices"],
        default=DTYPE.default,
        help=DTYPE.metadata["help"],
    )
    add_dataclass(parser, DeviceOptions, "device")
    add_dataclass(parser, EngineSizes, "engine: the largest steps that are recorded")


def run(arguments: argparse.Namespace) -> int:
    """Record, fit, write and print."""
    from octavo.bench.real_machine import RealMachine  # imports torch
    from octavo.bench.record import record

    setup = ReplaySetup(allocator="paged", **collect(arguments, EngineSizes))
    machine = RealMachine(
        arguments.model,
        dtype=arguments.dtype,
        block_size=setup.block_size,
        **collect(arguments, DeviceOptions),
    )
    times = record(machine, setup)
    path = arguments.out or default_path(times.recorded)
    write_step_times(path, times)
    print(as_table(times))
    print(f"written to {path}")
    return 0


def as_table(times: StepTimes) -> str:
    """The costs that the fit found, largest step first, and how well they tell other steps."""
    recorded, fit = times.recorded, times.fit
    lines = [
        f"{recorded.model} ({recorded.dtype}) on {recorded.machine}, threads: "
        f"{recorded.num_threads}",
        "",
        *_rows("executor", times.costs),
        *_rows("host", times.host_costs),
        "",
        f"{fit.num_steps} steps; of steps that it was not fitted on, the model is off by "
        f"{fit.median:.1%} (median) and {fit.p90:.1%} (90th percentile), and by {fit.total:.1%} "
        "of their sum",
    ]
    return "\n".join(lines)


def _rows(who: str, costs: dict[str, float]) -> list[str]:
    """A line for each cost that there is."""
    return [
        f"  {who + ', a ' + name:<34}{1e6 * seconds:12.3f} µs"
        for name, seconds in costs.items()
        if seconds > 0
    ]
