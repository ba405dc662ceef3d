"""`octavo bench latency`: one batch, up to its first tokens and from there to its last."""

import argparse

from octavo.bench.offline import LatencySetup, measure_latency
from octavo.cli.bench_flags import add_bench_flags, bench_options, print_table, write_result
from octavo.cli.flags import add_dataclass, collect

HELP = "measure the time to the first token and between tokens of one batch"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_dataclass(parser, LatencySetup, "batch")
    add_bench_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print and write."""
    setup = LatencySetup(**collect(arguments, LatencySetup))
    from octavo.engine import LLM  # brings torch in

    llm = LLM(arguments.model, **bench_options(arguments))
    result = measure_latency(llm, setup)
    llm.close()
    print(
        f"batch of {setup.batch_size}, {setup.input_len} prompt tokens and 1 + "
        f"{setup.output_len} output tokens each, medians of {setup.num_iters} runs"
    )
    print_table(
        {
            "first token, ms": f"{result.ttft_ms:,.2f}",
            "between tokens, ms": f"{result.tbt_ms:,.4f}",
            "engine step, ms (mean)": f"{result.step_ms:,.4f}",
            "whole batch, s": f"{result.latency_s:,.3f}",
            "output tokens/s, decoding": f"{result.output_tokens_per_s:,.1f}",
        }
    )
    write_result(arguments, setup, result)
    return 0
