"""Octavo and transformers in turn on this CPU: `make bench-cpu`.

Each engine runs in a fresh process, one after the other, several rounds, so that a machine whose
speed drifts is fair to both. Only the ratios mean anything on another machine. Writes
benchmarks/results/cpu.json, rows of {engine, dtype, workload, metric, unit, value, ratio}, where
ratio is Octavo's advantage over this peer at the same dtype (over 1: Octavo is ahead).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cpu.json"
README = HERE.parent / "README.md"
ENGINES = (
    ("octavo", "bfloat16"),
    ("transformers", "bfloat16"),
    ("octavo", "float32"),
    ("transformers", "float32"),
)
Figures = dict[str, list[float]]  # metric -> one value a run

UNITS = {
    "ready": ("s", "start of the process to ready"),
    "single decode": ("tokens/s", "128 in, 128 out, after the first token"),
    "prefill 1024": ("tokens/s", "one prompt"),
    "batch of 32": ("output tokens/s", "in and out uniform 32..256"),
    "peak memory": ("MiB", "resident set of the process"),
}
TABLE_START, TABLE_END = "<!-- made by make bench-cpu -->\n", "<!-- end of table -->"
LOWER_IS_BETTER = ("ready", "peak memory")


def write_plain_checkpoint(directory: Path) -> None:
    """The default model as bf16 safetensors, so that no peer has to unpack GGUF while it runs."""
    import torch
    from safetensors.torch import save_file

    from octavo.config import DEFAULT_MODEL, locate, read_model_config
    from octavo.weights import read_tensors

    checkpoint = locate(DEFAULT_MODEL)
    config = read_model_config(checkpoint)
    tensors = dict(read_tensors(checkpoint, config, dtype=torch.bfloat16))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(checkpoint.config()))


def run_engine(engine: str, dtype: str, model: Path, *, options: list[str]) -> Figures:
    """One process; its figures by metric."""
    command = [sys.executable, str(HERE / "cpu_engines.py"), engine, dtype]
    command += ["--model", str(model), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    figures: Figures = {}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout or ():
            if line.startswith("{"):
                row = json.loads(line)
                value = row.get("value", time.perf_counter() - start)
                figures.setdefault(row["metric"], []).append(value)
    if child.returncode:
        raise SystemExit(f"{engine} {dtype} ended with code {child.returncode}")
    return figures


def rows_of(figures: dict[tuple[str, str], Figures]) -> list[dict[str, object]]:
    """One row for each engine, dtype and metric: the median, and Octavo's ratio to it."""
    rows = []
    for (engine, dtype), metrics in figures.items():
        for metric, values in metrics.items():
            value = statistics.median(values)
            ours = statistics.median(figures["octavo", dtype][metric])
            ratio = value / ours if metric in LOWER_IS_BETTER else ours / value
            unit, workload = UNITS[metric]
            rows.append(
                {
                    "engine": engine,
                    "dtype": dtype,
                    "workload": workload,
                    "metric": metric,
                    "unit": unit,
                    "value": round(value, 2),
                    "min": round(min(values), 2),
                    "max": round(max(values), 2),
                    "num_runs": len(values),
                    "ratio": round(ratio, 2),
                }
            )
    return rows


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine(threads: int) -> dict[str, object]:
    """What the figures were taken on."""
    import torch
    import transformers

    from octavo.kernels import native

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "kernel_features": list(native.features()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "model": "SmolLM2-135M-Instruct",
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of the README, from the written result."""
    found, rows = result["machine"], result["rows"]
    lines = [
        f"{found['model']} on {found['cores']} cores of an {found['cpu']}, {found['threads']} "
        f"threads (kernels: {', '.join(found['kernel_features'])}), against transformers "
        f"{found['transformers']} on torch {found['torch']}, one after the other in one run at "
        f"commit {found['commit']}, medians. On another machine only the ratios mean anything.\n",
        "| | | transformers | Octavo | ratio |",
        "|---|---|---|---|---|",
    ]
    value = {(r["engine"], r["dtype"], r["metric"]): r for r in rows}
    for metric, (unit, workload) in UNITS.items():
        for dtype in ("bfloat16", "float32"):
            peer, ours = value["transformers", dtype, metric], value["octavo", dtype, metric]
            lines.append(
                f"| {metric} ({workload}), {unit} | {dtype} | {peer['value']:,.4g} | "
                f"{ours['value']:,.4g} | {peer['ratio']}× |"
            )
    return "\n".join(lines) + "\n"


def update_readme(result: dict[str, Any]) -> None:
    """Put the table into the README, between its marks."""
    before, _, rest = README.read_text().partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    README.write_text(before + TABLE_START + markdown(result) + TABLE_END + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each engine")
    parser.add_argument("--repeats", type=int, default=3, help="runs in each process")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    options = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    figures: dict[tuple[str, str], Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_plain_checkpoint(Path(folder))
        for round_number in range(arguments.rounds):
            for engine, dtype in ENGINES:
                print(f"round {round_number + 1}: {engine} {dtype} ...", flush=True)
                found = run_engine(engine, dtype, Path(folder), options=options)
                for metric, values in found.items():
                    figures.setdefault((engine, dtype), {}).setdefault(metric, []).extend(values)
    rows = rows_of(figures)
    result = {"machine": machine(arguments.threads), "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'metric':<16}{'dtype':<10}{'engine':<14}{'median':>10}  {'range':<20}{'ratio':>6}")
    for row in sorted(rows, key=lambda r: (list(UNITS).index(str(r["metric"])), str(r["dtype"]))):
        spread = f"{row['min']} to {row['max']}"
        print(
            f"{row['metric']:<16}{row['dtype']:<10}{row['engine']:<14}{row['value']:>10}  "
            f"{spread:<20}{row['ratio']:>6}"
        )
    if arguments.output == RESULTS:
        update_readme(result)
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
