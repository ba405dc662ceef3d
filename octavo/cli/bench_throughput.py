"""`octavo bench throughput`: tokens a second when all requests come at once."""

import argparse

from octavo.bench.offline import ThroughputSetup, measure_throughput
from octavo.cli.bench_flags import add_bench_flags, bench_options, print_table, write_result
from octavo.cli.flags import add_dataclass, collect

HELP = "measure tokens a second when all requests come at once"
NUM_REQUESTS_QUEUED = 1024  # an engine's own default


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_dataclass(parser, ThroughputSetup, "requests")
    add_bench_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print and write."""
    setup = ThroughputSetup(**collect(arguments, ThroughputSetup))
    from octavo.engine import LLM  # brings torch in

    queue = {"max_num_queued_reqs": max(NUM_REQUESTS_QUEUED, setup.num_requests)}
    llm = LLM(arguments.model, **(queue | bench_options(arguments)))
    result = measure_throughput(llm, setup)
    llm.close()
    print(
        f"{result.num_requests} requests, {result.num_prompt_tokens:,} prompt tokens, "
        f"{result.num_output_tokens:,} output tokens, runs: "
        + ", ".join(f"{seconds:.3f} s" for seconds in result.seconds)
    )
    print_table(
        {
            "requests/s": f"{result.requests_per_s:,.2f}",
            "prompt tokens/s": f"{result.prompt_tokens_per_s:,.1f}",
            "output tokens/s": f"{result.output_tokens_per_s:,.1f}",
            "total tokens/s": f"{result.total_tokens_per_s:,.1f}",
        }
    )
    write_result(arguments, setup, result)
    return 0
