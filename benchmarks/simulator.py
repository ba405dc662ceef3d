"""The outputs and pictures of docs/simulator.md and docs/batching.md: records, replays, compares.

    python benchmarks/simulator.py [record] [compare] [ladder] [real]

Runs the commands that the two pages show (all of them where none is named; some 15 minutes on two
quiet cores) and puts what they print between the pages' markers.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

# name: (page, command); each is shown on the page as it is run, and its output below it.
STEPS = {
    "record": ("simulator.md", "octavo bench record --device cpu"),
    "compare": (
        "simulator.md",
        "octavo sim --trace trace.jsonl --max-num-seqs 16 --compare --plot simulator.png",
    ),
    "ladder": ("batching.md", "octavo bench ladder --plot ladder-simulated.png"),
    "policies": ("scheduling.md", "octavo bench policies --plot policies.png"),
    "real": ("batching.md", "octavo bench ladder --real --plot ladder-real.png"),
}
TRACE = "octavo trace chat --num-requests 256 --rate 6 --scale 0.25 --seed 7 --out trace.jsonl"


def run(command: str, folder: Path) -> str:
    """What a command prints; its pictures go to the docs."""
    words = [str(DOCS / "images" / w) if w.endswith(".png") else w for w in shlex.split(command)]
    # Idle OpenMP threads give their core up sooner, for whatever else runs beside the model.
    environment = os.environ | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
    done = subprocess.run(
        [sys.executable, "-m", "octavo.cli", *words[1:]],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        check=True,
    )
    return done.stdout.replace(str(Path.home()), "~")


def put(page: Path, name: str, command: str, output: str) -> None:
    """Replace what stands between a page's markers; tables stay Markdown, the rest is a block."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.read_text().split(start)
    _, after = rest.split(end)
    head, bar, table = output.partition("\n| ")
    shown = f"```console\n$ {command}\n{head.strip()}\n```\n" + (bar + table).rstrip()
    page.write_text(before + start + shown.rstrip() + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("steps", nargs="*", metavar="STEP")
    wanted = parser.parse_args().steps or list(STEPS)
    (DOCS / "images").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run(TRACE, Path(folder))
        for name in wanted:
            page, command = STEPS[name]
            print(f"$ {command}", flush=True)
            output = run(command, Path(folder))
            print(output)
            put(DOCS / page, name, command, output)


if __name__ == "__main__":
    main()
