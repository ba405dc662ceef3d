"""What the HTTP front end costs, with an engine whose executor answers at once.

    python benchmarks/frontend.py [--rounds 5] [--step-ms 0] [--profile 5]

`octavo serve` as users start it: front end and engine are processes of their own, the scheduler is
the real one, and only the model is missing. This process is the client. Prints tokens a second over
256 streams and what each process used of a core; then the time to the first token at low load, by
HTTP and by calling the engine's `generate` in a process without HTTP; and, where it was asked for,
where the front end spends its time.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import uvloop
from http_load import Answer, Connection, http_request, percentile
from instant_engine import environment
from server_process import Server, serving, write_model

from octavo.config import EngineOptions, locate
from octavo.core import SamplingParams
from octavo.engine import AsyncEngine, EngineProcess
from octavo.text import load_tokenizer

NUM_CONNECTIONS = 256
NUM_TOKENS = 200  # of an answer
NUM_IN_TURN = 2  # answers on each connection
NUM_LOW = 200  # requests at low load
TEXT = "The quick brown fox jumps over the lazy dog. "
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def request_of(kind: str, num_tokens: int) -> bytes:
    """A streaming request; no answer ends early."""
    body: dict[str, object] = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": TEXT}]
    else:
        body["prompt"] = TEXT
    return http_request(PATHS[kind], body)


async def stream_all(port: int, kind: str) -> tuple[float, float]:
    """Tokens a second over all connections, and the client's share of a core."""
    connections = await asyncio.gather(*[open_for(port, kind) for _ in range(NUM_CONNECTIONS)])
    request = request_of(kind, NUM_TOKENS)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()

    async def in_turn(connection: Connection) -> list[Answer]:
        return [await connection.ask(request) for _ in range(NUM_IN_TURN)]

    answers = sum(await asyncio.gather(*map(in_turn, connections)), [])
    took_s = time.perf_counter() - start_s
    used = (time.process_time() - start_cpu_s) / took_s
    num_tokens = sum(a.num_frames - num_other_frames(kind) for a in answers)
    if not all(a.ended_well for a in answers):
        raise RuntimeError("a stream did not end well")
    if num_tokens != len(answers) * NUM_TOKENS:
        raise RuntimeError(f"{num_tokens} tokens came, not {len(answers) * NUM_TOKENS}")
    for connection in connections:
        connection.abort()
    return num_tokens / took_s, used


def num_other_frames(kind: str) -> int:
    """Frames of a stream that hold no token: the role of a chat, and the reason of the end."""
    return 2 if kind == "chat" else 1


async def open_for(port: int, kind: str) -> Connection:
    return await Connection.open(port, num_silent_frames=num_other_frames(kind) - 1)


async def low_load(port: int, kind: str, gap_s: float, num: int) -> list[float]:
    """Seconds to the first token of requests on one connection, one each `gap_s`."""
    connection = await open_for(port, kind)
    found = []
    for _ in range(num):
        answer = await connection.ask(request_of(kind, 8))
        found.append(answer.ttft_s)
        await asyncio.sleep(max(0.0, gap_s - (answer.last_s - answer.start_s)))
    connection.abort()
    return found


async def low_load_direct(model: Path, env: dict[str, str], gap_s: float) -> list[float]:
    """The same without HTTP: seconds until `generate` yields, of prompts that are token ids."""
    os.environ.update(env)
    values = {"device": "cpu", "num_threads": 1, "kv_cache_memory_bytes": 2**28}
    process = EngineProcess(EngineOptions.from_flat(str(model), values))
    try:
        tokenizer = load_tokenizer(locate(str(model)))
        engine = AsyncEngine(process, tokenizer, model_name="tiny")
        await engine.start()
        ids = tokenizer.encode(TEXT)
        sampling = SamplingParams(max_tokens=8, ignore_eos=True)
        found = []
        for number in range(NUM_LOW):
            start_s, first_s = time.perf_counter(), 0.0
            async for _ in engine.generate(str(number), ids, sampling):
                first_s = first_s or time.perf_counter()
            found.append(first_s - start_s)
            await asyncio.sleep(max(0.0, gap_s - (time.perf_counter() - start_s)))
        await engine.stop()
    finally:
        process.stop()
    return found


def measure_streams(server: Server, num_rounds: int) -> None:
    """Print tokens a second and shares of cores, medians of some rounds in turn."""
    rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in PATHS}
    for index in range(num_rounds + 1):
        for kind in PATHS:
            before, start_s = server.cpu_s(), time.perf_counter()
            tokens_per_s, client = uvloop.run(stream_all(server.port, kind))
            took_s = time.perf_counter() - start_s
            used = [(after - before[name]) / took_s for name, after in server.cpu_s().items()]
            if index:  # the first round warms up
                rows[kind].append((tokens_per_s, *used, client))
    print(
        f"{'':>12}{'tok/s':>9}{'lowest':>9}{'highest':>9}  cores: front end, engine, client; "
        "front end, us/token"
    )
    for kind, found in rows.items():
        rates, *shares = zip(*found, strict=True)
        s_per_token = [share / rate for share, rate in zip(shares[0], rates, strict=True)]
        medians = "".join(f"{statistics.median(share):>10.2f}" for share in shares)
        print(
            f"{kind:>12}{statistics.median(rates):>9.0f}{min(rates):>9.0f}{max(rates):>9.0f}"
            f"{medians}{1e6 * statistics.median(s_per_token):>10.1f}"
        )


def measure_low_load(server: Server, model: Path, env: dict[str, str]) -> None:
    """Print the time to the first token with and without HTTP."""
    print(f"{'TTFT, ms':>24}{'p50':>8}{'p99':>8}{'added p50':>11}{'added p99':>11}")
    for name, gap_s in (("one after another", 0.0), ("10 req/s", 0.1)):
        direct = uvloop.run(low_load_direct(model, env, gap_s))
        rows = {"generate()": direct}
        for kind in PATHS:
            rows[kind] = uvloop.run(low_load(server.port, kind, gap_s, NUM_LOW))
        print(name)
        for kind, found in rows.items():
            p50, p99 = (1e3 * percentile(found, share) for share in (0.5, 0.99))
            base50, base99 = (1e3 * percentile(direct, share) for share in (0.5, 0.99))
            added = "" if kind == "generate()" else f"{p50 - base50:>11.2f}{p99 - base99:>11.2f}"
            print(f"{kind:>24}{p50:>8.2f}{p99:>8.2f}{added}")


def profile(server: Server, num_lines: int) -> None:
    """Print where the front end spends its time while it streams: needs py-spy."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        command = ["py-spy", "record", "-p", str(server.process.pid), "-d", "6", "-r", "500"]
        command = [sys.executable.replace("python", "py-spy"), *command[1:]]
        spy = subprocess.Popen(
            [*command, "-f", "raw", "-o", str(raw)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while spy.poll() is None:
            uvloop.run(stream_all(server.port, "chat"))
        own: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for line in raw.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            frames = [frame.rpartition(":")[0] for frame in stack.split(";")]
            own[frames[-1]] += int(count)
            for frame in set(frames):
                total[frame] += int(count)
    num_samples = sum(own.values())
    for title, counter in (("itself", own), ("with what it calls", total)):
        print(f"share of samples, {title}")
        for frame, count in counter.most_common(num_lines):
            print(f"{100 * count / num_samples:>8.1f}%  {frame}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of streaming, after one to warm up")
    parser.add_argument("--step-ms", type=float, default=0.0, help="what a step takes")
    parser.add_argument("--profile", type=int, default=0, help="lines of a profile by py-spy")
    parser.add_argument("--no-low-load", action="store_true", help="leave TTFT out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model, env = write_model(Path(name)), environment(Path(name), step_ms=options.step_ms)
        with serving(model, "--max-num-seqs", str(NUM_CONNECTIONS), environment=env) as server:
            print(f"load average at the start: {os.getloadavg()[0]:.2f}")
            measure_streams(server, options.rounds)
            if options.profile:
                profile(server, options.profile)
            if not options.no_low_load:
                measure_low_load(server, model, env)


if __name__ == "__main__":
    main()
