"""Faults and overload against a real server process, and whether its promises hold.

    python benchmarks/chaos.py [--overload-s 60] [--only NAME ...]

The model is tiny and random, everything else is `octavo serve` as it is. Prints a line for each
fault with the promises (docs/reliability.md) that it puts to the test and what was measured; ends
with status 1 where one was broken. After each fault that a server survives, a known prompt has its
known tokens, nobody runs or waits, and all blocks are free.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from http_load import Answer, Client, closed_loop, http_request, open_loop, percentile
from server_process import Server, serving, start_and_wait, until, write_model

PATH = "/v1/completions"
NUM_STREAMS = 8
STOPPED_S = 10.0
NUM_STORM = 500
PEAK_S = 10.0
DEADLINE_MS = 5000
NUM_TOKENS = 400  # of an answer under load
FACTOR = 10
MAX_REFUSAL_S = 0.05
MIN_GOODPUT = 0.9
SEQS = ("--max-num-seqs", "16", "--max-num-queued-reqs", "16")


@dataclass
class Row:
    """What became of one fault: what holds by name, and what was measured."""

    name: str
    promises: str
    holds: dict[str, bool]
    measured: str


def stream_of(num_tokens: int, **fields: object) -> bytes:
    """A streamed completion that does not end early."""
    body = {"prompt": "The quick brown fox", "max_tokens": num_tokens, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return http_request(PATH, body | fields)


def is_whole(answer: Answer | None, num_tokens: int) -> bool:
    """Whether a stream ended well, and by its own count with all its tokens."""
    told = f'"completion_tokens":{num_tokens},'.encode()
    return answer is not None and answer.ended_well and told in answer.tail


async def streams_while(
    port: int, num: int, num_tokens: int, fault: Callable[[], object]
) -> list[Answer | None]:
    """Streams that have all begun when the fault comes; what they were told."""
    client = Client(port)
    asking = [
        asyncio.create_task(client.ask(stream_of(num_tokens), timeout_s=120)) for _ in range(num)
    ]
    await asyncio.sleep(0.5)
    await asyncio.to_thread(fault)
    answers = await asyncio.gather(*asking)
    client.close()
    return list(answers)


@contextmanager
def unharmed(server: Server, holds: dict[str, bool]) -> Iterator[None]:
    """Note whether the server is after the fault what it was before."""
    before, said = server.rss_mib(), server.golden()
    yield
    with contextlib.suppress(TimeoutError):
        until(server.is_at_rest)
    holds["at rest, all blocks free"] = server.is_at_rest()
    holds["golden tokens"] = server.golden() == said
    holds["same processes"] = server.rss_mib().keys() == before.keys()


def killed(model: Path) -> Row:
    """`kill -9` of the engine in the middle of its streams."""
    with serving(model, *SEQS) as server:
        killed_s = red_s = 0.0

        def kill() -> None:
            nonlocal killed_s, red_s
            server.engine.kill()
            killed_s = time.monotonic()
            until(lambda: server.get("/health")[0] in (503, 0))
            red_s = time.monotonic() - killed_s

        answers = asyncio.run(streams_while(server.port, NUM_STREAMS, 4000, kill))
        status = server.process.wait(20)
        last = server.err.rstrip().splitlines()[-1]
    num_told = sum(a is not None and b"engine_dead" in a.tail and a.ended for a in answers)
    holds = {
        "every stream ends with an error event": num_told == NUM_STREAMS,
        "health red within 5 s": red_s < 5,
        "exit status 1": status == 1,
        "the cause is the last line": "SIGKILL" in last,
    }
    measured = f"{num_told} of {NUM_STREAMS} streams told, health red after {red_s:.2f} s"
    return Row("kill -9 of the engine", "P1 P10", holds, measured)


def stopped(server: Server) -> Row:
    """SIGSTOP of the engine, and SIGCONT later."""
    holds: dict[str, bool] = {}

    def stop() -> None:
        server.engine.send_signal(signal.SIGSTOP)
        try:
            time.sleep(STOPPED_S)
        finally:
            server.engine.send_signal(signal.SIGCONT)

    with unharmed(server, holds):
        answers = asyncio.run(streams_while(server.port, NUM_STREAMS, 3000, stop))
    whole = sum(is_whole(a, 3000) for a in answers)
    holds["every stream is whole"] = whole == NUM_STREAMS
    holds["ready again"] = server.get("/ready")[0] == 200
    measured = f"{whole} of {NUM_STREAMS} streams whole"
    return Row(f"SIGSTOP for {STOPPED_S:.0f} s", "P1 P12", holds, measured)


def port_taken(server: Server, model: Path) -> Row:
    """A second server on the port of the first."""
    holds: dict[str, bool] = {}
    with unharmed(server, holds):
        start_s = time.monotonic()
        status, err = start_and_wait(model, "--port", str(server.port))
        took_s = time.monotonic() - start_s
    last = err.rstrip().splitlines()[-1]
    holds["the second ends with status 1"] = status == 1
    holds["and says how to choose another"] = "--port" in last
    return Row("port taken", "P10", holds, f"the second ended after {took_s:.1f} s")


def disk_full(model: Path) -> Row:
    """Every write to the log fails, as on a full disk."""
    holds: dict[str, bool] = {}
    with (
        open("/dev/full", "wb") as full,
        serving(model, *SEQS, "--log-requests", stderr=full) as server,
        unharmed(server, holds),
    ):
        answers = asyncio.run(streams_while(server.port, NUM_STREAMS, 200, lambda: None))
        whole = sum(is_whole(a, 200) for a in answers)
    holds["every stream is whole"] = whole == NUM_STREAMS
    return Row("full disk for logs", "P1", holds, f"{whole} of {NUM_STREAMS} streams whole")


def storm(model: Path) -> Row:
    """Many clients that stream, and all go away at once."""
    holds: dict[str, bool] = {}
    with serving(model, "--max-num-seqs", "64") as server, unharmed(server, holds):
        left_s, left_steps = 0.0, 0.0

        async def run() -> list[Answer | None]:
            nonlocal left_s, left_steps
            client = Client(server.port)
            staying = [asyncio.create_task(client.ask(stream_of(2000))) for _ in range(4)]
            leaving = [
                asyncio.create_task(client.leave(stream_of(2000), after_s=3600.0))
                for _ in range(NUM_STORM)
            ]
            await asyncio.sleep(3.0)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            start_s = time.monotonic()
            live = "num_requests_running", "num_requests_waiting"
            begin = await asyncio.to_thread(server.metric, "engine_steps_total")

            def num_live() -> float:
                return sum(map(server.metric, live))

            while await asyncio.to_thread(num_live) > len(staying):
                await asyncio.sleep(0.005)
            left_s = time.monotonic() - start_s
            left_steps = await asyncio.to_thread(server.metric, "engine_steps_total") - begin
            answers = await asyncio.gather(*staying)
            client.close()
            return list(answers)

        answers = asyncio.run(run())
    whole = sum(is_whole(a, 2000) for a in answers)
    holds["those who stay get all their tokens"] = whole == len(answers)
    holds["what the others held is free within 5 s"] = left_s < 5
    measured = (
        f"all {NUM_STORM} gone from the engine after {left_s:.2f} s and at most {left_steps:.0f} "
        f"steps; {whole} of {len(answers)} others whole"
    )
    return Row(f"{NUM_STORM} clients leave at once", "P2 P5", holds, measured)


def goodput(answers: list[Answer], seconds: float) -> float:
    """Tokens a second of answers that came whole, within their deadline."""
    in_time = [a for a in answers if a.ended_well and a.took_s <= DEADLINE_MS / 1e3]
    return NUM_TOKENS * len(in_time) / seconds


def overload(model: Path, seconds: float) -> Row:
    """Ten times what the server can do."""
    holds: dict[str, bool] = {}
    request = stream_of(NUM_TOKENS, deadline_ms=DEADLINE_MS)
    with serving(model, *SEQS) as server, unharmed(server, holds):

        def measured_peak(num: int) -> float:
            return goodput(
                asyncio.run(closed_loop(server.port, request, num=num, seconds=PEAK_S)), PEAK_S
            )

        measured_peak(16)  # warms up
        before = max(measured_peak(num) for num in (16, 32))
        answers: list[Answer] = []
        num_lost = 0

        async def run() -> None:
            client = Client(server.port)
            end_s = time.perf_counter() + seconds

            async def one(_: int) -> None:
                nonlocal num_lost
                answer = await client.ask(request)
                if answer is None:
                    num_lost += 1
                elif answer.last_s <= end_s or answer.status != 200:
                    answers.append(answer)

            await open_loop(FACTOR * before / NUM_TOKENS, seconds, one)
            client.close()

        asyncio.run(run())
        peak = max(before, measured_peak(32))  # a machine is not equally fast all the time
    refused = [a for a in answers if a.status == 503]
    refusal_s = [a.took_s for a in refused] or [0.0]
    share = goodput(answers, seconds) / peak
    statuses = Counter(a.status for a in answers)
    holds[f"goodput at least {MIN_GOODPUT:.0%} of the peak"] = share >= MIN_GOODPUT
    holds["everybody hears of an end"] = num_lost == 0 and all(a.ended for a in answers)
    holds["refused or answered, nothing else"] = set(statuses) <= {200, 503, 504}
    holds["refusals say when to come back"] = all(b"retry-after:" in a.head for a in refused)
    holds["half of the refusals within 50 ms"] = percentile(refusal_s, 0.5) < MAX_REFUSAL_S
    measured = (
        f"goodput {share:.0%} of the peak of {peak:.0f} tok/s; {dict(sorted(statuses.items()))}, "
        f"{num_lost} lost; refused after {1e3 * percentile(refusal_s, 0.5):.0f} ms (p50), "
        f"{1e3 * percentile(refusal_s, 0.99):.0f} ms (p99)"
    )
    return Row(f"{FACTOR}x overload for {seconds:.0f} s", "P1 P3 P11", holds, measured)


def drained(model: Path) -> Row:
    """SIGTERM in the middle of streams."""
    with serving(model, *SEQS) as server:
        answers = asyncio.run(
            streams_while(server.port, NUM_STREAMS, 1500, server.process.terminate)
        )
        status = server.process.wait(30)
    whole = sum(is_whole(a, 1500) for a in answers)
    holds = {"every stream is whole": whole == NUM_STREAMS, "exit status 0": status == 0}
    return Row("SIGTERM under load", "P1", holds, f"{whole} of {NUM_STREAMS} streams whole")


def faults(model: Path, overload_s: float) -> dict[str, Callable[[], Row]]:
    """All faults, by a short name."""

    def with_server(play: Callable[[Server], Row]) -> Row:
        with serving(model, *SEQS) as server:
            return play(server)

    return {
        "kill": lambda: killed(model),
        "stop": lambda: with_server(stopped),
        "port": lambda: with_server(lambda server: port_taken(server, model)),
        "disk": lambda: disk_full(model),
        "storm": lambda: storm(model),
        "drain": lambda: drained(model),
        "overload": lambda: overload(model, overload_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overload-s", type=float, default=60.0, help="length of the overload")
    parser.add_argument("--only", nargs="+", default=[], help="short names of faults")
    options = parser.parse_args()
    all_hold = True
    print(f"load average at the start: {os.getloadavg()[0]:.2f}")
    print("| fault | promises | hold | measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name))
        for short, play in faults(model, options.overload_s).items():
            if options.only and short not in options.only:
                continue
            row = play()
            broken = [what for what, is_so in row.holds.items() if not is_so]
            all_hold = all_hold and not broken
            verdict = "yes" if not broken else "**no**: " + ", ".join(broken)
            print(f"| {row.name} | {row.promises} | {verdict} | {row.measured} |", flush=True)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
