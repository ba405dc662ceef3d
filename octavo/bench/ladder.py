"""The ladder of batching and of KV memory: one trace, one engine, one rung after the other.

Owns the rungs and their table. Every rung is the engine that serves, with one switch changed; the
first one is what the others are compared with.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from octavo.config import option
from octavo.sim.replay import EngineSizes, Machine, Replay, ReplaySetup, replay
from octavo.sim.report import (
    Metrics,
    ServiceLevel,
    all_gaps_s,
    draw_distribution,
    import_pyplot,
    measure,
    save,
    ttft_s,
)
from octavo.sim.workload import TraceSize, Workload

# The trace that the ladder is climbed on where none is given: ShareGPT's lengths, faster than
# static batching can serve, behind system prompts, for a prefix cache to find. A quarter of the
# lengths lets a small model on two cores serve enough requests for the end of the trace, where no
# rung has a full batch any more, not to decide the result.
RECIPE = "chat"
SIZE = TraceSize(num_requests=384, rate=16.0, scale=0.25)

HEADER = (
    "| rung | throughput | to static | TTFT p50 | TTFT p99 | TBT p50 | TBT p99 |",
    "|---|---:|---:|---:|---:|---:|---:|",
)
CELLS = (
    ("ttft_p50_ms", "{:.0f} ms"),
    ("ttft_p99_ms", "{:.0f} ms"),
    ("tbt_p50_ms", "{:.1f} ms"),
    ("tbt_p99_ms", "{:.1f} ms"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderSizes(EngineSizes):
    """How large the engine is on every rung: a context for that trace, and memory for half a batch
    of such contexts, so that whoever reserves whole contexts runs short. Its fields are flags.
    """

    num_blocks: int = option(128, "KV blocks in the pool")
    max_model_len: int = option(512, "longest prompt and output together, in tokens")
    max_num_seqs: int = option(8, "sequences that run at once")


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to serve; what is not in its title is the same in its whole group."""

    group: str
    title: str
    batching: str
    allocator: str

    @property
    def name(self) -> str:
        """What tells a rung from all others that are not run alike."""
        return f"{self.batching}, {self.allocator}"


RUNGS = (
    *(
        Rung("batching, on paged memory", name, name, "paged")
        for name in ("static", "dynamic", "continuous", "chunked")
    ),
    *(
        Rung("memory, with chunked batching", name, "chunked", name)
        for name in ("contiguous", "paged", "paged+prefix")
    ),
)


@dataclass(frozen=True, slots=True)
class Climbed:
    """What came of one rung."""

    rung: Rung
    metrics: Metrics
    run: Replay


def climb(
    workload: Workload,
    setup: ReplaySetup,
    machine: Machine,
    *,
    level: ServiceLevel,
    on_rung: Callable[[Climbed], None] = lambda climbed: None,
) -> list[Climbed]:
    """Replay the trace on every rung; one that stands in both groups is run once."""
    done: dict[str, Climbed] = {}
    ladder = []
    for rung in RUNGS:
        if rung.name not in done:
            changed = dataclasses.replace(setup, batching=rung.batching, allocator=rung.allocator)
            run = replay(workload, changed, machine)
            done[rung.name] = Climbed(rung, measure(run, level), run)
            on_rung(done[rung.name])
        ladder.append(dataclasses.replace(done[rung.name], rung=rung))
    return ladder


def as_markdown(ladder: SequenceOf[Climbed]) -> str:
    """The table, a group of rows for each half of the ladder."""
    base = ladder[0].metrics.output_tokens_per_s
    lines = list(HEADER)
    for index, climbed in enumerate(ladder):
        if index == 0 or climbed.rung.group != ladder[index - 1].rung.group:
            lines.append(f"| **{climbed.rung.group}** |" + " |" * (len(CELLS) + 2))
        metrics = climbed.metrics
        cells = [
            climbed.rung.title,
            f"{metrics.output_tokens_per_s:.1f} tok/s",
            f"{metrics.output_tokens_per_s / base:.2f}×",
            *(form.format(getattr(metrics, name)) for name, form in CELLS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_ladder(path: Path, ladder: SequenceOf[Climbed]) -> None:
    """Bars of throughput, and the distributions of both latencies on every rung.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = import_pyplot()
    figure, (bars, ttft, tbt) = pyplot.subplots(1, 3, figsize=(12, 4))
    unique = {climbed.rung.name: climbed for climbed in ladder}
    bars.barh(list(unique), [climbed.metrics.output_tokens_per_s for climbed in unique.values()])
    bars.invert_yaxis()
    for name, climbed in unique.items():
        answered = [client for client in climbed.run.clients if client.token_times]
        draw_distribution(ttft, [ttft_s(client) for client in answered], "-", name)
        draw_distribution(tbt, 1e3 * all_gaps_s(climbed.run), "-", name)
    bars.set(title="output tokens/s")
    ttft.set(title="TTFT: share of requests", xlabel="s")
    tbt.set(title="TBT: share of tokens", xlabel="ms", xscale="log")
    ttft.legend(fontsize=7)
    for axes in (ttft, tbt):
        axes.grid(alpha=0.3)
    save(figure, path)
