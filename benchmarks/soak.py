"""Half an hour above capacity, with clients that leave and requests that make no sense.

    python benchmarks/soak.py [--minutes 30] [--factor 1.5] [--seed 0] [--output FILE]

A real server process with a tiny random model. Its capacity is measured first; then requests come
at a steady rate above it: one in five goes away while it streams, one in twenty is nonsense.
Nothing may be lost: every request ends with a finish, an error event or a refusal. Memory of both
processes is sampled each second; its slope, by least squares over the samples after the first
fifth, is to be flat. Prints a table, writes it as JSON with --output, and ends with status 1 where
something does not hold.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from http_load import Client, closed_loop, http_request, open_loop, percentile
from server_process import Server, serving, until, write_model

PATH = "/v1/completions"
CAPACITY_S = 10.0
WARM_UP_S = 20.0  # at the soak's own rate, before anything is counted
SHARE_LEAVING, SHARE_BAD = 0.20, 0.05
TOKENS = (50, 600)  # of an answer, uniformly
KV_BYTES = 2**25  # all of it is used once while the load warms up, so RAM does not grow by it
SEQS = ("--max-num-seqs", "16", "--max-num-queued-reqs", "16")
# Ways in which a request may end; while the queue is full, nobody looks at what it asks.
ALLOWED = {"200", "503", "bad, 400", "bad, 503"}
CLIENT = "client"  # this process
MAX_SLOPE_SHARE = 0.01  # of a process' memory, over the time of the soak
BAD = (
    b"{",
    {"prompt": 7},
    {"prompt": []},
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": 1e308},
    {"prompt": "x", "stop": [""]},
    {"prompt": "x" * 100_000},
    {"prompt": "x", "logit_bias": {"1000000": 1}},
    {"prompt": [10**9]},
)


@dataclass
class Books:
    """What became of all requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    num_left: int = 0
    num_lost: int = 0
    num_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)


def slope_per_hour(times_s: list[float], values: list[float]) -> float:
    """The least-squares line through the samples, as its rise in an hour."""
    mean_t, mean_v = sum(times_s) / len(times_s), sum(values) / len(values)
    over = sum((t - mean_t) * (v - mean_v) for t, v in zip(times_s, values, strict=True))
    return 3600 * over / sum((t - mean_t) ** 2 for t in times_s)


def create_prompts(rng: random.Random) -> list[str]:
    """The texts of the soak, again and again.

    With new ones each time the tokenizer's cache of words, which is bounded at 10,000, would grow
    through the whole soak: the tiny model's tokenizer takes each text for one word.
    """
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(5, 400))) for _ in range(200)]


def good_request(prompts: list[str], rng: random.Random) -> tuple[bytes, int]:
    """One that the server can answer, and how many tokens it asks for."""
    num_tokens = rng.randint(*TOKENS)
    body = {"prompt": rng.choice(prompts), "max_tokens": num_tokens, "ignore_eos": True}
    return http_request(PATH, body | {"stream": True}), num_tokens


async def one_request(client: Client, prompts: list[str], rng: random.Random, books: Books) -> None:
    """Ask, leave or talk nonsense, and note what came of it."""
    kind = rng.random()
    if kind < SHARE_BAD:
        answer = await client.ask(http_request(PATH, rng.choice(BAD)))
        if answer is None:
            books.num_lost += 1
        else:
            books.statuses[f"bad, {answer.status}"] += 1
        return
    request, num_tokens = good_request(prompts, rng)
    if kind < SHARE_BAD + SHARE_LEAVING:
        await client.leave(request, after_s=rng.uniform(0.0, 1.0))
        books.num_left += 1
        return
    answer = await client.ask(request, timeout_s=120)
    if answer is None or not answer.ended:
        books.num_lost += 1
        return
    if answer.ended_well:
        books.num_tokens += num_tokens
        books.latencies_s.append(answer.took_s)
    is_error = answer.status == 200 and not answer.ended_well
    books.statuses["200, error event" if is_error else str(answer.status)] += 1


async def sample(server: Server, samples: list[tuple[float, dict[str, float]]]) -> None:
    """Memory of both processes and of this one, each second, until cancelled."""
    client = psutil.Process()
    while True:
        ours = {CLIENT: client.memory_info().rss / 2**20}
        samples.append((time.monotonic(), server.rss_mib() | ours))
        await asyncio.sleep(1.0)


async def soak(
    server: Server, rate: float, seconds: float, rng: random.Random
) -> tuple[Books, list[tuple[float, dict[str, float]]]]:
    """The load, and beside it the samples of memory."""
    books = Books()
    client, prompts = Client(server.port), create_prompts(rng)
    warming = Books()
    await open_loop(rate, WARM_UP_S, lambda i: one_request(client, prompts, rng, warming))
    samples: list[tuple[float, dict[str, float]]] = []
    sampling = asyncio.create_task(sample(server, samples))
    await open_loop(rate, seconds, lambda i: one_request(client, prompts, rng, books))
    sampling.cancel()
    client.close()
    return books, samples


def capacity(server: Server) -> float:
    """Requests a second that it can answer: the better of two loads, after a warm-up."""
    mean = sum(TOKENS) / 2
    body = {"prompt": "abc " * 50, "max_tokens": int(mean), "ignore_eos": True, "stream": True}
    request = http_request(PATH, body)
    rates = [
        len(asyncio.run(closed_loop(server.port, request, num=num, seconds=CAPACITY_S)))
        / CAPACITY_S
        for num in (16, 16, 24)
    ]
    return max(rates[1:])


@dataclass(frozen=True)
class Memory:
    """What a process held in RAM after the warm-up: MiB at first and at last, and the slope."""

    first_mib: float
    last_mib: float
    slope_mib_per_hour: float
    is_flat: bool

    @classmethod
    def of(cls, times_s: list[float], values: list[float]) -> "Memory":
        """From its samples; flat is a line that rises by less than a share of what it began at."""
        slope = slope_per_hour(times_s, values)
        rise = slope * (times_s[-1] - times_s[0]) / 3600
        return cls(values[0], values[-1], slope, rise <= MAX_SLOPE_SHARE * values[0])


def result_of(
    books: Books, samples: list[tuple[float, dict[str, float]]], seconds: float
) -> dict[str, Any]:
    """What was found, as it is written to a file. The client's own memory is told, not judged."""
    late = samples[len(samples) // 5 :]
    times_s = [t for t, _ in late]
    memory = {name: Memory.of(times_s, [m[name] for _, m in late]) for name in late[0][1]}
    latency_s = {
        f"p{100 * share:.0f}": percentile(books.latencies_s, share)
        for share in (0.5, 0.99)
        if books.latencies_s
    }
    judged = [of_one.is_flat for name, of_one in memory.items() if name != CLIENT]
    return {
        "seconds": seconds,
        "ended": dict(sorted(books.statuses.items())),
        "left": books.num_left,
        "lost": books.num_lost,
        "tokens_per_s": books.num_tokens / seconds,
        "latency_s": latency_s,
        "memory": {name: asdict(of_one) for name, of_one in memory.items()},
        "holds": not books.num_lost and set(books.statuses) <= ALLOWED and all(judged),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = ["| what | measured |", "|---|---|"]
    lines += [f"| ended: {name} | {count} |" for name, count in result["ended"].items()]
    lines += [f"| {name} | {result[name]} |" for name in ("left", "lost")]
    lines += [f"| tok/s to those who stayed | {result['tokens_per_s']:.0f} |"]
    lines += [f"| answers took, {name} | {s:.2f} s |" for name, s in result["latency_s"].items()]
    for name, found in result["memory"].items():
        verdict = "flat" if found["is_flat"] else "**not flat**"
        lines.append(
            f"| memory of the {name} | {found['first_mib']:.1f} to {found['last_mib']:.1f} MiB, "
            f"{found['slope_mib_per_hour']:+.2f} MiB/h, {verdict} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--factor", type=float, default=1.5, help="load over capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the result, as JSON")
    options = parser.parse_args()
    rng, seconds = random.Random(options.seed), 60 * options.minutes
    with (
        tempfile.TemporaryDirectory() as name,
        serving(write_model(Path(name)), *SEQS, kv_bytes=KV_BYTES) as server,
    ):
        print(f"load average at the start: {os.getloadavg()[0]:.2f}")
        said, rate = server.golden(), capacity(server)
        print(f"capacity {rate:.1f} req/s; {options.factor * rate:.1f} req/s for {seconds:.0f} s")
        books, samples = asyncio.run(soak(server, options.factor * rate, seconds, rng))
        rest_s = until(server.is_at_rest)
        same = server.golden() == said
        print(f"at rest, all blocks free after {rest_s:.2f} s; golden tokens: {same}")
    result = result_of(books, samples, seconds)
    result |= {"capacity_per_s": rate, "factor": options.factor, "seed": options.seed}
    result |= {"at_rest_s": rest_s, "golden_tokens": same, "holds": result["holds"] and same}
    print(as_markdown(result))
    print("holds" if result["holds"] else "DOES NOT HOLD")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
