"""Swarm testing: every seed draws its own engine, workload and mix of faults, and must hold.

    python -m octavo.sim.swarm --seed N        one seed, with its story
    python -m octavo.sim.swarm --seeds A B     soak: seeds A to B-1

Owns the dice. Drawing the *kinds* of faults anew for each seed, and not only their moments, reaches
corners that a mix of everything never does (Groce et al., "Swarm testing", ISSTA 2012); one integer
gives a run back in full. Knows no rule of the engine: promises are kept by `History` and
`SimulatedEngine`.
"""

import argparse
import contextlib
import dataclasses
import logging
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from octavo.core import Request, RequestOptions, SamplingParams
from octavo.errors import OctavoError
from octavo.scheduler import BATCHINGS, POLICIES, PREEMPTION_MODES
from octavo.sim.actions import (
    Action,
    Arrive,
    Cancel,
    CancelEverybody,
    Drain,
    JumpWallClock,
    Pause,
    Squeeze,
)
from octavo.sim.faults import Fault, Faults
from octavo.sim.parts import EngineSetup, Parts
from octavo.sim.simulation import SimulatedEngine

VOCAB_SIZE = 128  # small, so that stop tokens come up
PROGRESS_EVERY_S = 5.0
DRAWN_FAULTS = tuple(fault for fault in Fault if fault is not Fault.CONSEQUENCE)


class SwarmFailure(OctavoError):
    """A seed broke a promise; the message says which, and how to see it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One seed's engine, workload and faults."""

    seed: int
    setup: EngineSetup
    actions: tuple[Action, ...]
    faults: Faults


def draw_scenario(seed: int) -> Scenario:
    """Everything that a seed decides."""
    rng = random.Random(seed)
    setup = _draw_windows(seed, _draw_allocator(seed, _draw_setup(rng)))
    requests = _draw_requests(rng, setup)
    duration_s = rng.choice((0.05, 0.05, 0.5, 2.0))
    arrivals = [
        Arrive(
            at_s=rng.uniform(0.0, duration_s),
            request=request,
            siblings=_draw_siblings(rng, request),
        )
        for request in requests
    ]
    actions = [*arrivals, *_draw_cancellations(rng, arrivals), *_draw_disturbances(rng, setup)]
    return Scenario(
        seed=seed,
        setup=setup,
        actions=tuple(actions),
        faults=Faults(
            rates=_draw_rates(rng), lethal_rate=rng.choice((0.0, 0.0, 0.0, 0.3)), seed=seed
        ),
    )


def run_seed(seed: int, *, parts: Parts | None = None) -> SimulatedEngine:
    """Play one seed to its end; raises `SwarmFailure` where a promise was broken."""
    scenario = draw_scenario(seed)
    engine = SimulatedEngine(scenario.setup, faults=scenario.faults, parts=parts)
    try:
        engine.run(scenario.actions)
        if not engine.history.engine_died:
            engine.probe()
    except Exception as error:
        raise SwarmFailure(_describe_failure(scenario, engine, error)) from error
    return engine


@contextlib.contextmanager
def quiet_engine() -> Iterator[None]:
    """Failed steps are what we ask for: the engine's log of them would bury everything else."""
    logger = logging.getLogger("octavo")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _draw_setup(rng: random.Random) -> EngineSetup:
    block_size = rng.choice((1, 2, 4, 4, 8, 16))
    num_tokens = rng.choice((24, 40, 40, 80, 200, 400))  # that the pool holds
    prefix_caching = rng.random() < 0.6
    has_host = prefix_caching and rng.random() < 0.7
    return EngineSetup(
        num_blocks=max(2, num_tokens // block_size),
        block_size=block_size,
        max_num_batched_tokens=rng.choice((1, 3, 8, 16, 16, 40, 128)),
        max_num_seqs=rng.choice((1, 2, 4, 8, 16, 16)),
        max_model_len=rng.choice((48, 96, 96)),
        vocab_size=VOCAB_SIZE,
        max_num_queued=rng.choice((None, None, None, None, 2)),
        prefix_caching=prefix_caching,
        num_host_blocks=rng.choice((1, 8, 32, 128)) if has_host else 0,
        num_disk_blocks=rng.choice((0, 2, 16, 64)) if has_host else 0,
        preemption=rng.choice(("swap", "swap", *PREEMPTION_MODES)),
        copy_block_s=rng.choice((0.0001, 0.002, 0.1)),
        num_drafts=rng.choice((0, 0, 0, 1, 3)),
        policy=rng.choice(("fcfs", "fcfs", *POLICIES)),
        batching=rng.choice(("chunked", "chunked", *BATCHINGS)),
        asynchronous=rng.random() < 0.5,
        eager=rng.random() < 0.5,
    )


def _draw_allocator(seed: int, setup: EngineSetup) -> EngineSetup:
    """Now and then what was before pages; with dice of its own, so that other draws stay."""
    rng = random.Random(f"allocator {seed}")
    if rng.random() > 0.12:
        return setup
    return dataclasses.replace(
        setup,
        allocator=rng.choice(("contiguous", "contiguous-buddy")),
        max_model_len=min(setup.max_model_len, setup.num_blocks * setup.block_size // 2),
        prefix_caching=False,
        num_host_blocks=0,
        num_disk_blocks=0,
    )


def _draw_windows(seed: int, setup: EngineSetup) -> EngineSetup:
    """Now and then layers with windows, of one length or two, beside others or not; own dice."""
    rng = random.Random(f"windows {seed}")
    if rng.random() > 0.2 or setup.allocator != "paged":
        return setup
    window, longer = rng.choice((2, 3, 5, 8, 17)), rng.choice((20, 33))
    windows = rng.choice(
        ((window,), (None, window), (None, window), (None, window, window), (None, window, longer))
    )
    return dataclasses.replace(
        setup,
        windows=windows,
        num_blocks=setup.num_blocks * len(windows),
        num_host_blocks=0,
        num_disk_blocks=0,
    )


def _draw_requests(rng: random.Random, setup: EngineSetup) -> list[Request]:
    """Requests that share beginnings and salts, stop early or late; a few can never run."""
    beginnings = [_draw_tokens(rng, 32) for _ in range(rng.randint(1, 3))]
    salts = rng.choice(((None,), (None,), (None, "a"), ("a", "b")))
    deadlines = rng.choice(((None,), (None,), (None, None, 20, 500)))
    prompt_len, output_len = rng.choice((4, 12, 40)), rng.choice((4, 16, 40))
    eos_token_ids = tuple(_draw_tokens(rng, rng.choice((0, 0, 2, 6))))
    room = min(setup.max_model_len, setup.num_blocks * setup.block_size)
    requests = []
    for index in range(rng.choice((1, 4, 8, 16))):
        shared = rng.choice(beginnings)[: rng.randint(0, prompt_len)]
        prompt = shared + _draw_tokens(rng, rng.randint(0, prompt_len))
        max_tokens = rng.randint(1, output_len)
        if rng.random() < 0.95:  # mostly it fits, if only just
            prompt = (prompt or beginnings[0])[: room - 1]
            max_tokens = min(max_tokens, room - len(prompt) + rng.choice((0, 0, 1, 2)))
        sampling = SamplingParams(
            max_tokens=None if rng.random() < 0.02 else max_tokens,
            min_tokens=rng.choice((0, 0, max_tokens // 2)),
            ignore_eos=rng.random() < 0.2,
        )
        # An id that comes twice is refused while the first lives, and fine after its end.
        request_id = f"r{rng.randint(0, index) if rng.random() < 0.1 else index}"
        requests.append(
            Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=sampling,
                seed=0,
                eos_token_ids=eos_token_ids,
                options=_draw_options(rng, salts, deadlines),
            )
        )
    return requests


def _draw_siblings(rng: random.Random, request: Request) -> tuple[Request, ...]:
    """Some clients want several answers to one prompt."""
    count = rng.choice((0, 0, 0, 0, 0, 0, 1, 3))
    name = request.request_id
    return tuple(
        msgspec.structs.replace(request, request_id=f"{name}.{i}") for i in range(1, count + 1)
    )


def _draw_options(
    rng: random.Random, salts: tuple[str | None, ...], deadlines: tuple[int | None, ...]
) -> RequestOptions:
    return RequestOptions(
        cache_salt=rng.choice(salts),
        priority=rng.choice((0, 0, 1, -1)),
        tenant=rng.choice(("", "a", "b")),
        deadline_ms=rng.choice(deadlines),
    )


def _draw_tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(VOCAB_SIZE), k=count)


def _draw_cancellations(rng: random.Random, arrivals: list[Arrive]) -> list[Action]:
    """Clients that go away: before, while or after they are answered, alone or in a storm."""
    rate = rng.choice((0.0, 0.0, 0.1, 0.5))
    last_s = max(arrival.at_s for arrival in arrivals)
    actions: list[Action] = []
    for arrival in arrivals:
        if rng.random() < rate:
            known = [r.request_id for a in arrivals for r in a.requests]
            ids = rng.choices(known, k=rng.choice((0, 0, 2)))
            actions.append(
                Cancel(
                    at_s=arrival.at_s + rng.expovariate(5.0),
                    request_ids=(arrival.request.request_id, *ids),
                )
            )
    if rng.random() < 0.1:
        actions.append(CancelEverybody(at_s=rng.uniform(0.0, 2.0 * last_s)))
    return actions


def _draw_disturbances(rng: random.Random, setup: EngineSetup) -> list[Action]:
    """Scarce memory, clocks that jump, a process that stands still, a drain."""
    actions: list[Action] = []
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            start_s = rng.uniform(0.0, 1.0)
            num_blocks = rng.randint(1, setup.num_blocks)
            actions.append(Squeeze(at_s=start_s, num_blocks=num_blocks))
            actions.append(Squeeze(at_s=start_s + rng.uniform(0.02, 0.5), num_blocks=0))
    if rng.random() < 0.2:
        actions.append(JumpWallClock(at_s=rng.random(), seconds=rng.choice((-1e9, -60.0, 3600.0))))
    if rng.random() < 0.1:
        actions.append(Pause(at_s=rng.random(), seconds=rng.choice((0.1, 10.0, 1e6))))
    if rng.random() < 0.1:
        actions.append(Drain(at_s=rng.random()))
    return actions


def _draw_rates(rng: random.Random) -> dict[Fault, float]:
    """This seed's faults: none, one, some or all kinds, rare or frequent."""
    how_many = rng.choice((0.0, 0.1, 0.3, 1.0))
    rates: dict[Fault, float] = {
        f: rng.choice((0.003, 0.02, 0.1)) for f in DRAWN_FAULTS if rng.random() < how_many
    }
    if Fault.LOST_BLOCK in rates:
        rates[Fault.LOST_BLOCK] *= 5  # few steps copy anything that could be lost
    return rates


def _describe_failure(scenario: Scenario, engine: SimulatedEngine, error: Exception) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    faults = ", ".join(f"{fault} {rate:g}" for fault, rate in scenario.faults.rates.items())
    return "\n".join(
        (
            f"seed {scenario.seed} failed at step {engine.num_steps}",
            *(f"  {line}" for line in causes),
            f"replay: python -m octavo.sim.swarm --seed {scenario.seed}",
            f"engine: {scenario.setup}",
            f"faults: {faults or 'none'}; lethal {scenario.faults.lethal_rate}",
            "last steps (! = samples):",
            str(engine.trace),
        )
    )


def _describe_run(seed: int, engine: SimulatedEngine) -> str:
    """The story of one seed that held."""
    lines = [f"seed {seed}: {engine.setup}"]
    for client in engine.history.clients:
        fault = f", {client.fault}" if client.fault is not None else ""
        lines.append(
            f"  {client.request.request_id}: {len(client.request.prompt_token_ids)} prompt tokens, "
            f"{client.num_cached_tokens} cached, {client.num_output_tokens} of "
            f"{client.max_num_tokens - len(client.request.prompt_token_ids)} generated, "
            f"{client.accepted_at_s:.3f}s to {client.ended_at_s:.3f}s, {client.end}{fault}"
        )
    stats = engine.core.stats()
    lines.append(
        f"  {engine.num_steps} steps, {engine.history.num_refused} refused, "
        f"{stats.num_preemptions} preemptions, "
        + ("the engine died as it should" if engine.history.engine_died else "all promises held")
    )
    return "\n".join(lines)


def _soak(first: int, last: int) -> int:
    """Run many seeds; print each failure and go on. Returns how many failed."""
    start = shown = time.perf_counter()
    num_failed = num_steps = num_requests = 0
    for seed in range(first, last):
        try:
            engine = run_seed(seed)
            num_steps += engine.num_steps
            num_requests += len(engine.history.clients)
        except SwarmFailure as failure:
            num_failed += 1
            print(failure, flush=True)
        now = time.perf_counter()
        if now - shown > PROGRESS_EVERY_S or seed == last - 1:
            shown, num_done = now, seed - first + 1
            print(
                f"{num_done} seeds, {num_failed} failed, {num_requests} requests, "
                f"{num_steps} steps, {num_done / (now - start):.0f} seeds/s",
                flush=True,
            )
    return num_failed


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m octavo.sim.swarm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="replay one seed and tell its story")
    which.add_argument("--seeds", type=int, nargs=2, metavar=("A", "B"), help="run seeds A to B-1")
    options = parser.parse_args(arguments)
    with quiet_engine():
        if options.seeds:
            return 1 if _soak(*options.seeds) else 0
        try:
            print(_describe_run(options.seed, run_seed(options.seed)))
        except SwarmFailure as failure:
            print(failure)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
