"""What the techniques of the core are worth with the real model: one table, measured in turn.

    python benchmarks/features.py [--model MODEL] [--dtype bfloat16]

Prefix cache: time to the first token behind a shared prefix of 1,000 tokens. Fork: eight answers to
one prompt of 500 tokens, against eight requests without sharing. Asynchronous loop: a batch of 32.
Preemption: a pool for half of the batch, by swap, recompute and the cost model. Each figure is the
median of some rounds in which the variants take turns, so that drift of the machine hits all.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

from workload import batch, random_ids

from octavo.config import DEFAULT_MODEL, EngineOptions
from octavo.core import Request, SamplingParams
from octavo.engine import BuiltEngine, build_engine

NUM_ROUNDS = 3
_names = itertools.count(1000)


def build(model: str, dtype: str, **options: object) -> BuiltEngine:
    return build_engine(EngineOptions.from_flat(model, {"dtype": dtype, **options}))


def requests(prompt: list[int], max_tokens: int, count: int = 1) -> list[Request]:
    name = next(_names)
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    return [
        Request(request_id=f"{name}#{i}", prompt_token_ids=list(prompt), sampling=sampling, seed=i)
        for i in range(count)
    ]


def run(engine: BuiltEngine, groups: list[list[Request]]) -> tuple[float, float]:
    """Seconds until the first token, and until the last."""
    start, first = time.perf_counter(), 0.0
    for group in groups:
        engine.core.add(*group)
    while engine.core.has_work:
        events = engine.core.step()
        if events and not first:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start


def in_turn(variants: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each variant over rounds in which they take turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(NUM_ROUNDS + 1):
        for name, measure in variants.items():
            found = measure()
            if index:
                seconds[name].append(found)
    return {name: statistics.median(found) for name, found in seconds.items()}


def shared_prefix(model: str, dtype: str) -> None:
    engine = build(model, dtype)

    def ttft(*, cached: bool) -> float:
        prefix = random_ids(1000, 1 if cached else next(_names))
        return run(engine, [requests(prefix + random_ids(16, next(_names)), 1)])[0]

    found = in_turn({"cold": lambda: ttft(cached=False), "warm": lambda: ttft(cached=True)})
    show("TTFT, 1,000 shared tokens and 16 of one's own", found, base="cold", unit="ms")


def forks(model: str, dtype: str) -> None:
    engine = build(model, dtype, enable_prefix_caching=False)

    def seconds(*, together: bool) -> float:
        prompt = random_ids(500, next(_names))
        eight = requests(prompt, 32, count=8)
        groups = [eight] if together else [[request] for request in eight]
        return run(engine, groups)[1]

    found = in_turn(
        {"apart": lambda: seconds(together=False), "forked": lambda: seconds(together=True)}
    )
    show("8 answers of 32 tokens to a prompt of 500", found, base="apart", unit="ms")


def batch_requests() -> list[list[Request]]:
    return [requests(prompt, num_tokens) for prompt, num_tokens in batch(next(_names))]


def loops(model: str, dtype: str) -> None:
    engines = {
        name: build(model, dtype, async_scheduling=name == "asynchronous")
        for name in ("synchronous", "asynchronous")
    }
    found = in_turn({name: lambda e=e: run(e, batch_requests())[1] for name, e in engines.items()})
    show("batch of 32", found, base="synchronous", unit="ms")


def preemptions(model: str, dtype: str) -> None:
    block_bytes = build(model, dtype).config.kv_block_bytes

    def engine(mode: str, num_blocks: int) -> BuiltEngine:
        host = {} if mode == "recompute" else {"kv_offloading_size": 1.0}
        return build(
            model,
            dtype,
            max_model_len=1024,
            kv_cache_memory_bytes=num_blocks * block_bytes,
            preemption_mode=mode,
            **host,
        )

    engines = {mode: engine(mode, 300) for mode in ("recompute", "swap", "auto")}
    engines["none needed"] = engine("recompute", 1500)
    found = in_turn({name: lambda e=e: run(e, batch_requests())[1] for name, e in engines.items()})
    counts = {name: e.core.stats().num_preemptions for name, e in engines.items()}
    show("batch of 32 in a pool for half of it", found, base="recompute", unit="ms")
    print(f"    preemptions in all rounds: {counts}")


def show(title: str, found: dict[str, float], *, base: str, unit: str) -> None:
    parts = [
        f"{name} {1e3 * seconds:,.0f} {unit}"
        + ("" if name == base else f" ({found[base] / seconds:.2f}x)")
        for name, seconds in found.items()
    ]
    print(f"{title}: " + ", ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    for measure in (shared_prefix, forks, loops, preemptions):
        measure(options.model, options.dtype)


if __name__ == "__main__":
    main()
