"""`octavo sim`: replays a trace through the scheduler in virtual time."""

import argparse
from pathlib import Path

from octavo.cli.flags import add_dataclass, collect
from octavo.sim.replay import EngineSizes, Machine, ReplaySetup, SimulatedMachine, replay
from octavo.sim.report import ServiceLevel, as_table, compare, draw, measure, write_json
from octavo.sim.step_time import Recorded, StepTimes, read_step_times
from octavo.sim.workload import read_trace

HELP = "replay a trace through the real scheduler in virtual time"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--trace",
        type=Path,
        required=True,
        metavar="FILE",
        help="the requests, as `octavo trace` makes them",
    )
    add_steps_flag(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run the trace on the recorded model as well, and print the error of the simulation",
    )
    add_output_flags(parser)
    add_dataclass(parser, ReplaySetup, "engine")
    add_dataclass(parser, ServiceLevel, "service level")


def add_steps_flag(parser: argparse.ArgumentParser) -> None:
    """--steps."""
    parser.add_argument(
        "--steps",
        type=Path,
        metavar="FILE",
        help="how long steps take, as `octavo bench record` writes it; default: recorded last",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """--plot and --json."""
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg or .pdf)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Replay, print, draw."""
    workload = read_trace(arguments.trace)
    times = read_step_times(arguments.steps)
    setup = ReplaySetup(**collect(arguments, ReplaySetup))
    level = ServiceLevel(**collect(arguments, ServiceLevel))
    print(describe_steps(times, setup))
    runs = {"simulated": replay(workload, setup, SimulatedMachine(times))}
    if arguments.compare:
        runs["real"] = replay(workload, setup, load_recorded(times.recorded, setup))
    metrics = {name: measure(run, level) for name, run in runs.items()}
    print(compare(**metrics) if arguments.compare else as_table(metrics))
    if arguments.json is not None:
        write_json(arguments.json, metrics)
    if arguments.plot is not None:
        draw(arguments.plot, runs)
    return 0


def describe_steps(times: StepTimes, sizes: EngineSizes) -> str:
    """Whose steps are replayed, how well they are known, and what the sizes mean for them."""
    recorded, fit = times.recorded, times.fit
    lines = [
        f"steps of {recorded.model} ({recorded.dtype}) on {recorded.machine}, "
        f"{recorded.num_threads} threads; one step is off by {fit.median:.1%} (median), all "
        f"{fit.num_steps} together by {fit.total:.1%}"
    ]
    pool_bytes = sizes.num_blocks * sizes.block_size * recorded.kv_token_bytes
    lines.append(
        f"KV pool: {sizes.num_blocks} blocks of {sizes.block_size} tokens, "
        f"{pool_bytes / 2**20:.1f} MiB"
    )
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        known, wanted = getattr(recorded, name), getattr(sizes, name)
        if wanted > known:
            lines.append(f"steps were recorded with {name} {known}: beyond that they are guessed")
    return "\n".join(lines) + "\n"


def load_recorded(recorded: Recorded, sizes: EngineSizes) -> Machine:
    """The model whose steps were recorded, loaded in the same way."""
    from octavo.bench.real_machine import RealMachine  # imports torch

    return RealMachine(
        recorded.model,
        dtype=recorded.dtype,
        device=recorded.device,
        num_threads=recorded.num_threads,
        block_size=sizes.block_size,
    )
