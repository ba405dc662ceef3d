"""`python -m octavo.kernels.native` builds the CPU kernels ahead of the first use."""

from __future__ import annotations

import argparse
import sys
import time

from octavo.kernels.native.compiler import BuildError, build
from octavo.kernels.native.library import Library


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m octavo.kernels.native", description=__doc__)
    parser.add_argument("--march", default="native", help="instruction set, as in g++ -march")
    march = parser.parse_args().march
    started_s = time.monotonic()
    try:
        built = build(march)
    except BuildError as failure:
        print(f"not built: {failure}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started_s
    print(f"{built.command}\n{built.path}")
    print(f"compiled in {seconds:.1f} s" if built.compiled else "already built")
    print(f"features: {' '.join(Library(built.path).features())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
