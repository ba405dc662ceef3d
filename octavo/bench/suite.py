"""The offline workloads that peers were measured with, all on one engine, in the peers' order.

`python -m octavo.bench.suite` reads one `SuiteOrder` as JSON on standard input, runs it in a
process of its own, which frees the device when it ends, and writes one `Figure` a line. Knows
neither the peers' figures nor files.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.bench.draws import Draws, Work, uniform_work
from octavo.bench.offline import measure_decoding, run_work, vocab_size_of
from octavo.engine import LLM

GREEDY = 0.0


class SuiteOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    only: names of workloads; what the others would have drawn is drawn all the same.
    repeats: runs that count, after a first one that finds caches cold and graphs uncaptured.
    budget_s: no further run is begun where it would likely end later than this; each has its first.
    divisor: all lengths and numbers of requests are divided by this, to try the script out.
    """

    model: str
    options: dict[str, Any]
    only: list[str]
    repeats: int = 3
    budget_s: float = 240.0
    divisor: int = 1


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one run; run 0 is the first."""

    workload: str
    metric: str
    run: int
    value: float


@dataclass(frozen=True, slots=True)
class Offline:
    """A workload. Its runs take turns with the draws, as many as the peers' script makes.

    counted: which tokens a second are the figure; None where the time between tokens is, over
        `num_decoded` tokens after the first.
    """

    name: str
    works: tuple[Work, ...]
    counted: str | None = None
    num_decoded: int = 0

    def run(self, llm: LLM, run: int) -> Iterator[Figure]:
        """Run once."""
        work = self.works[run % len(self.works)]
        if self.counted is None:
            decoding = measure_decoding(llm, work, self.num_decoded)
            values = {"TBT": decoding.tbt_ms, "TTFT": decoding.ttft_ms}
        else:
            num_tokens = {
                "output": work.sum_output_tokens,
                "prompt": work.sum_prompt_tokens,
                "total": work.sum_prompt_tokens + work.sum_output_tokens,
            }
            values = {"throughput": num_tokens[self.counted] / run_work(llm, work)}
        for metric, value in values.items():
            yield Figure(workload=self.name, metric=metric, run=run, value=value)


def peer_workloads(vocab_size: int, *, divisor: int = 1) -> tuple[Work, list[Offline]]:
    """The warm-up request, and all workloads, drawn in the order of the peers' script."""

    def part(number: int) -> int:
        return max(1, number // divisor)

    draws = Draws(vocab_size)
    warm_up = draws.warm_up()
    uniform = uniform_work(vocab_size, num_requests=part(256), lengths=(part(100), part(1024)))
    singles = tuple(draws.work(1, part(128), 1, temperature=GREEDY) for _ in range(2))
    workloads = [
        Offline("offline256", (uniform,), "output"),
        Offline("decode bs1", singles, num_decoded=part(512)),
    ]
    for batch_size in (32, 128):
        batch = draws.work(batch_size, part(512), 1)
        workloads.append(Offline(f"decode bs{batch_size}", (batch,), num_decoded=part(256)))
    long, many = draws.work(8, part(8192), 1), draws.work(64, part(1024), 1)
    mixed = draws.work(part(512), part(1024), part(128))
    workloads += [
        Offline("prefill 8x8192", (long,), "prompt"),
        Offline("prefill 64x1024", (many,), "prompt"),
        Offline("1024/128 x512", (mixed,), "total"),
    ]
    # Not of the peers' script, so drawn last: where a mixture of experts reads nearly all of them.
    batch = draws.work(64, part(512), 1)
    workloads.append(Offline("decode bs64", (batch,), num_decoded=part(256)))
    return warm_up, workloads


def run_suite(llm: LLM, order: SuiteOrder, *, start_s: float) -> Iterator[Figure]:
    """All workloads once, then again, round by round, for as long as there is time.

    start_s: when the time that is budgeted began, on `time.perf_counter`.
    """
    warm_up, workloads = peer_workloads(vocab_size_of(llm), divisor=order.divisor)
    run_work(llm, warm_up)
    took_s: dict[str, float] = {}
    for run in range(order.repeats + 1):
        for workload in workloads:
            begun = time.perf_counter()
            late = begun - start_s + took_s.get(workload.name, 0.0) > order.budget_s
            if workload.name not in order.only or (run > 0 and late):
                continue
            yield from workload.run(llm, run)
            took_s[workload.name] = time.perf_counter() - begun


def main() -> None:
    """Entry point of the process."""
    start_s = time.perf_counter()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=SuiteOrder)
    llm = LLM(order.model, **order.options)
    for figure in run_suite(llm, order, start_s=start_s):
        print(msgspec.json.encode(figure).decode(), flush=True)
    llm.close()


if __name__ == "__main__":
    main()
