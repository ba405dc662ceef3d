"""What a replay was like, in numbers, tables and pictures. Knows no engine.

TTFT is the time from a request's arrival to its first token, TBT the time between two successive
tokens of a request; percentiles of TBT are over all gaps of all requests.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from octavo.config import option
from octavo.errors import ConfigError
from octavo.sim.replay import Client, Replay


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLevel:
    """What a request must get for it to count as good. Its fields are flags.

    The bound on TBT is for the 99th percentile of the request's own gaps: a stall is a stall,
    however smooth the rest was.
    """

    ttft_slo_ms: float = option(1000.0, "a good request gets its first token within this time")
    tbt_slo_ms: float = option(
        100.0, "99% of the gaps between a good request's tokens are no longer than this"
    )


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """One replay. Throughputs are over the time from the trace's begin to the last token."""

    num_requests: int
    num_refused: int
    duration_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tbt_p50_ms: float
    tbt_p99_ms: float
    output_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float  # requests a second that met the service level
    num_steps: int
    num_preemptions: int
    num_blocks: int
    peak_blocks: int  # held by requests, the shared ones counted once
    mean_blocks: float  # over time
    cached_share: float  # of prompt tokens, found in the prefix cache


# (field, heading, format) of the columns that tables show.
COLUMNS = (
    ("ttft_p50_ms", "TTFT p50", "{:.0f} ms"),
    ("ttft_p99_ms", "TTFT p99", "{:.0f} ms"),
    ("tbt_p50_ms", "TBT p50", "{:.1f} ms"),
    ("tbt_p99_ms", "TBT p99", "{:.1f} ms"),
    ("output_tokens_per_s", "throughput", "{:.1f} tok/s"),
    ("requests_per_s", "requests", "{:.2f}/s"),
    ("goodput_per_s", "goodput", "{:.2f}/s"),
    ("duration_s", "duration", "{:.1f} s"),
    ("num_steps", "steps", "{}"),
    ("num_refused", "refused", "{}"),
    ("num_preemptions", "preemptions", "{}"),
    ("peak_blocks", "KV blocks, peak", "{}"),
    ("mean_blocks", "KV blocks, mean", "{:.1f}"),
    ("num_blocks", "KV blocks, all", "{}"),
    ("cached_share", "prompt tokens cached", "{:.1%}"),
)
COMPARED = tuple(name for name, _, _ in COLUMNS if name not in ("num_blocks", "num_refused"))


def measure(replay: Replay, level: ServiceLevel) -> Metrics:
    """Reduce a replay to its numbers.

    Raises:
        ConfigError: nobody was answered.
    """
    answered = [client for client in replay.clients if client.token_times]
    if not answered:
        raise ConfigError("no request of the trace was taken, so there is nothing to measure")
    ttft_ms = np.array([ttft_s(client) for client in answered]) * 1e3
    tbt_ms = all_gaps_s(replay) * 1e3
    duration_s = max(client.token_times[-1] for client in answered)
    num_prompt_tokens = sum(client.request.num_prompt_tokens for client in answered)
    return Metrics(
        num_requests=len(replay.clients),
        num_refused=len(replay.clients) - len(answered),
        duration_s=duration_s,
        ttft_p50_ms=float(np.quantile(ttft_ms, 0.5)),
        ttft_p99_ms=float(np.quantile(ttft_ms, 0.99)),
        tbt_p50_ms=float(np.quantile(tbt_ms, 0.5)) if len(tbt_ms) else 0.0,
        tbt_p99_ms=float(np.quantile(tbt_ms, 0.99)) if len(tbt_ms) else 0.0,
        output_tokens_per_s=sum(len(client.token_times) for client in answered) / duration_s,
        requests_per_s=len(answered) / duration_s,
        goodput_per_s=sum(is_good(client, level) for client in answered) / duration_s,
        num_steps=sum(step.shape.num_seqs > 0 for step in replay.steps),
        num_preemptions=replay.num_preemptions,
        num_blocks=replay.setup.num_blocks,
        peak_blocks=max(moment.num_used_blocks for moment in replay.moments),
        mean_blocks=_mean_blocks(replay),
        cached_share=sum(client.num_cached_tokens for client in answered) / num_prompt_tokens,
    )


def ttft_s(client: Client) -> float:
    """Seconds from arrival to the first token."""
    return client.token_times[0] - client.request.arrival_s


def gaps_s(client: Client) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Seconds between successive tokens of a request."""
    return np.diff(np.asarray(client.token_times))


def all_gaps_s(replay: Replay) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The gaps of all requests, one after the other."""
    return np.concatenate([gaps_s(client) for client in replay.clients])


def is_good(client: Client, level: ServiceLevel) -> bool:
    """Whether a request met the service level."""
    gaps = gaps_s(client)
    worst_ms = 1e3 * float(np.quantile(gaps, 0.99)) if len(gaps) else 0.0
    return 1e3 * ttft_s(client) <= level.ttft_slo_ms and worst_ms <= level.tbt_slo_ms


def _mean_blocks(replay: Replay) -> float:
    """Blocks held, weighted by how long; a step's holdings count for the time up to its end."""
    times = np.array([0.0] + [moment.at_s for moment in replay.moments])
    blocks = np.array([moment.num_used_blocks for moment in replay.moments])
    return float((np.diff(times) * blocks).sum() / times[-1])


def write_json(path: Path, metrics: Mapping[str, Metrics]) -> None:
    """Metrics by the name of their run; raises `ConfigError` where the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(metrics), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def as_table(columns: Mapping[str, Metrics]) -> str:
    """Metrics as aligned rows, one column for each run."""
    rows = [("", *columns)]
    for name, heading, form in COLUMNS:
        rows.append((heading, *(form.format(getattr(m, name)) for m in columns.values())))
    return _aligned(rows)


def compare(simulated: Metrics, real: Metrics) -> str:
    """Both runs beside each other, with the simulator's error in per cent of the real value."""
    rows = [("", "simulated", "real", "error")]
    for name, heading, form in COLUMNS:
        ours, truth = getattr(simulated, name), getattr(real, name)
        error = f"{relative_error(ours, truth):+.1%}" if name in COMPARED and truth else ""
        rows.append((heading, form.format(ours), form.format(truth), error))
    return _aligned(rows)


def relative_error(simulated: float, real: float) -> float:
    """(simulated - real) / real."""
    return (simulated - real) / real


def _aligned(rows: SequenceOf[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def draw(path: Path, runs: Mapping[str, Replay]) -> None:
    """A picture of replays of one trace: who runs and waits, blocks held, and both latencies.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    figure, ((queue, blocks), (ttft, tbt)) = pyplot.subplots(2, 2, figsize=(10, 6.5))
    for style, (name, run) in zip(("-", "--", ":", "-."), runs.items(), strict=False):
        times = [moment.at_s for moment in run.moments]
        running = [moment.num_running for moment in run.moments]
        waiting = [moment.num_waiting for moment in run.moments]
        held = [moment.num_used_blocks for moment in run.moments]
        queue.plot(times, running, style, color="tab:blue", lw=1, label=f"{name}: running")
        queue.plot(times, waiting, style, color="tab:orange", lw=1, label=f"{name}: waiting")
        blocks.plot(times, held, style, color="tab:green", lw=1, label=name)
        answered = [client for client in run.clients if client.token_times]
        draw_distribution(ttft, [1e3 * ttft_s(client) for client in answered], style, name)
        draw_distribution(tbt, 1e3 * all_gaps_s(run), style, name)
    queue.set(title="requests", xlabel="s")
    blocks.set(title="KV blocks held", xlabel="s")
    ttft.set(title="TTFT: share of requests", xlabel="ms")
    tbt.set(title="TBT: share of tokens", xlabel="ms", xscale="log")
    for axes in (queue, blocks, ttft, tbt):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def draw_distribution(axes: Any, values: Any, style: str, name: str) -> None:
    """A cumulative distribution of at most a thousand points."""
    shares = np.linspace(0.0, 1.0, min(1000, max(2, len(values))))
    if len(values):
        axes.plot(np.quantile(values, shares), shares, style, lw=1, label=name)


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files only; raises `ConfigError` where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib: install octavo[plot], or leave --plot out"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as the path's ending says; raises `ConfigError` where that cannot be done."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot {path} cannot be written: {error}") from error
