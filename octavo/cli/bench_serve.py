"""`octavo bench serve`: a load on a server of this machine, started for the purpose or running."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from octavo.bench.serve import Load, ServeSetup, Spread, check_loopback, measure_load
from octavo.bench.server_process import running_server
from octavo.cli.bench_flags import add_bench_flags, bench_options, write_result
from octavo.cli.flags import add_dataclass, collect, engine_options, engine_values, flag
from octavo.config import locate, read_model_config
from octavo.errors import ConfigError

HELP = "measure latency and throughput of a server under requests that come at a given rate"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="a server that runs on this machine; default: start one for the measurement",
    )
    parser.add_argument(
        "--request-rate",
        type=float,
        nargs="+",
        default=[math.inf],
        metavar="RATE",
        help="requests a second, in a Poisson process; inf sends all at once (default: inf); "
        "several are measured one after the other",
    )
    parser.add_argument(
        "--save-result",
        action="store_true",
        help="write the result to bench-serve.json where --output-json names no other file",
    )
    add_dataclass(parser, ServeSetup, "requests")
    add_bench_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure at every rate, print and write."""
    setup = ServeSetup(**collect(arguments, ServeSetup))
    if arguments.save_result and arguments.output_json is None:
        arguments.output_json = Path("bench-serve.json")
    loads = []
    with _server(arguments, setup) as (url, model, fitting):
        for rate in arguments.request_rate:
            loads.append(measure_load(url, model, fitting, rate))
            print_load(loads[-1])
    write_result(arguments, fitting, loads)
    return 0


@contextmanager
def _server(
    arguments: argparse.Namespace, setup: ServeSetup
) -> Iterator[tuple[str, str, ServeSetup]]:
    """URL, the model's name there, and the requests, with ids that the model has."""
    if arguments.base_url is not None:
        if given := engine_values(arguments):
            raise ConfigError(
                f"{flag(next(iter(given)))} is for a server that is started here, and --base-url "
                "names one that runs already"
            )
        yield check_loopback(arguments.base_url), arguments.model, setup
        return
    options = bench_options(arguments)
    engine_options(arguments)  # what is wrong with them is better said before anything starts
    checkpoint = locate(arguments.model, weights=False)
    last_id = read_model_config(checkpoint).vocab_size - 1
    setup = replace(setup, max_token_id=min(setup.max_token_id, last_id))
    with running_server(arguments.model, options) as url:
        yield url, checkpoint.name, setup


def print_load(load: Load) -> None:
    """A table for one rate."""
    rate = "all at once" if load.request_rate is None else f"{load.request_rate:g} a second"
    print(
        f"{load.num_prompts} requests, {rate}: {load.duration_s:.2f} s, "
        f"{load.output_tokens_per_s:,.1f} output tokens/s, {load.requests_per_s:.2f} requests/s"
    )
    print(f"  {'ms':<8}{'p50':>10}{'p90':>10}{'p99':>10}")
    spreads: dict[str, Spread] = {"TTFT": load.ttft_ms, "TPOT": load.tpot_ms, "ITL": load.itl_ms}
    for name, spread in spreads.items():
        print(f"  {name:<8}{spread.p50:>10.2f}{spread.p90:>10.2f}{spread.p99:>10.2f}", flush=True)
