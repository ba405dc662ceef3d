"""Damaged checkpoints, thousands of them, each used as a user would.

PYTHONPATH=tests python -m fuzz --seed N         one seed, with its damage and its end
PYTHONPATH=tests python -m fuzz --seeds A B      seeds A to B-1, in a process for each core
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fuzz.pool import fuzz, limit_memory, replay, work


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="play one seed in this process")
    which.add_argument("--seeds", type=int, nargs=2, metavar=("A", "B"))
    which.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return 0
    if options.seeds:
        return _range(*options.seeds, num_workers=options.processes)
    return _one(options.seed)


def _range(first: int, last: int, *, num_workers: int) -> int:
    start = time.perf_counter()
    report = fuzz(first, last, num_workers=num_workers, progress=True)
    seconds = time.perf_counter() - start
    print(f"{report.num_cases} cases in {seconds:.0f} s, {len(report.failures)} failed")
    for outcome, count in report.outcomes.most_common(12):
        print(f"  {count:7} {outcome}")
    return 1 if report.failures else 0


def _one(seed: int) -> int:
    from fuzz.cases import Case, draw_case
    from fuzz.play import BrokenPromise, play

    case = draw_case(seed)
    print(f"{case.base}, {', '.join(case.changes)}: {case.note}", flush=True)
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as folder:
        play(Case(case.base, case.base, {}), Path(folder) / "case")
        limit_memory()
        start = time.perf_counter()
        try:
            print(play(case, Path(folder) / "case"))
        except BrokenPromise as broken:
            print(f"FAILED: {broken}\nreplay: {replay(seed)}")
            return 1
        finally:
            print(f"{time.perf_counter() - start:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
