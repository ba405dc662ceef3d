"""`octavo tune kernels`: measures block sizes on the GPU at hand. Never done at start-up."""

import argparse
from pathlib import Path

from octavo.config import ALIASES
from octavo.errors import ConfigError

HELP = "measure what runs fastest on this machine, and remember it"
KERNELS_HELP = "measure block sizes of matrix products on this GPU, for weights of given shapes"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each thing that can be tuned."""
    things = parser.add_subparsers(dest="thing", required=True, metavar="THING")
    kernels = things.add_parser("kernels", help=KERNELS_HELP, description=KERNELS_HELP)
    kernels.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="tune all weights of this model, of which config.json is enough; may be given several "
        f"times (aliases: {', '.join(ALIASES)})",
    )
    kernels.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="N,K",
        help="tune a weight of N outputs and K inputs; may be given several times",
    )
    kernels.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the table to add to; default: the user's own, block_sizes.json in ~/.cache/octavo, "
        "which every engine reads before the one that is shipped",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write."""
    from octavo.bench.tuned_shapes import model_shapes, parse_shape, require_gpu  # imports torch

    shapes = [parse_shape(text) for text in arguments.shape]
    models = {model: model_shapes(model) for model in arguments.model}
    if not shapes and not models:
        raise ConfigError("say what to tune: --model MODEL or --shape N,K")
    require_gpu()
    from octavo.bench.tune_kernels import step_table, tune_and_write  # imports triton

    every = shapes + [shape for weights in models.values() for shape in weights]
    path, plans = tune_and_write(every, arguments.output, lambda text: print(text, flush=True))
    print(f"written to {path}")
    for model, weights in models.items():
        print(f"\nall products of a step of {model}, ms:\n{'rows':>6}{'torch':>9}{'ours':>9}")
        for rows, by_torch, by_us in step_table(weights, plans):
            print(f"{rows:6}{by_torch:9.3f}{by_us:9.3f}", flush=True)
    return 0
