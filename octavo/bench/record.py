"""Records steps of a real engine and learns from them how long a step takes.

Owns the choice of steps: batches from one sequence to the most that may run, with short and long
contexts; prompts whole and in chunks; and everything mixed, as a trace of requests mixes it.
"""

import random
import statistics
from collections.abc import Sequence as SequenceOf

from octavo.bench.real_machine import RealMachine
from octavo.errors import ConfigError
from octavo.sim.replay import ReplaySetup, replay
from octavo.sim.step_time import StepTimes, TimedStep, fit
from octavo.sim.workload import (
    RECIPES,
    VERSION,
    TraceHeader,
    TraceRequest,
    TraceSize,
    Workload,
    make_workload,
)

NUM_PASSES = 3
NUM_DECODE_STEPS = 16  # of each batch and context
SHORT_CONTEXT, MIDDLE_CONTEXT, LONG_CONTEXT = 16, 256, 1024
NUM_MIXED_REQUESTS = 48
MIXED_SCALE = 0.125


def record(machine: RealMachine, setup: ReplaySetup) -> StepTimes:
    """Run the engine through all kinds of steps that `setup` allows, and fit a model to them.

    Raises:
        ConfigError: `setup` allows too few steps to learn from.
    """
    return fit(record_steps(machine, setup), machine.describe(setup))


def record_steps(machine: RealMachine, setup: ReplaySetup) -> list[TimedStep]:
    """The steps of every workload of `recorded_workloads`, after a warm-up.

    All run several times, each time in another order, and of each step the median counts: a machine
    that is slower for a while must not make one kind of step look slow. A workload's requests come
    all at once, so its steps are the same every time.
    """
    replay(_batch(2, SHORT_CONTEXT, NUM_DECODE_STEPS), setup, machine)
    rng = random.Random(0)
    workloads = recorded_workloads(setup)
    runs: list[list[list[TimedStep]]] = [[] for _ in workloads]
    for _ in range(NUM_PASSES):
        for index in rng.sample(range(len(workloads)), len(workloads)):
            runs[index].append(replay(workloads[index], setup, machine).steps)
    steps = [_median(same) for passes in runs for same in zip(*passes, strict=True)]
    return [step for step in steps if step.shape.num_seqs]


def _median(same: SequenceOf[TimedStep]) -> TimedStep:
    """One step from those that were the same."""
    return TimedStep(
        shape=same[0].shape,
        seconds=statistics.median(step.seconds for step in same),
        host_s=statistics.median(step.host_s for step in same),
    )


def recorded_workloads(setup: ReplaySetup) -> list[Workload]:
    """What is run to record steps: each a trace of its own, all of it within `setup`."""
    room = min(setup.max_model_len, setup.num_blocks * setup.block_size)
    if room < SHORT_CONTEXT + 2 * NUM_DECODE_STEPS:
        raise ConfigError(
            f"steps are recorded with {SHORT_CONTEXT + 2 * NUM_DECODE_STEPS} tokens and more in a "
            f"sequence, but only {room} fit; allow a longer context or more blocks"
        )
    batches = _doublings(1, setup.max_num_seqs)
    # Long contexts cost long prefills, so they are recorded for a few sizes of batch only.
    few = sorted({1, 4, 16, setup.max_num_seqs} & set(batches))
    sizes = [(num_seqs, SHORT_CONTEXT) for num_seqs in batches]
    sizes += [(num_seqs, MIDDLE_CONTEXT) for num_seqs in few]
    sizes += [(num_seqs, LONG_CONTEXT) for num_seqs in few[:2]]
    workloads = [_decodes(num_seqs, min(context, room), setup) for num_seqs, context in sizes]
    longest = min(room - 1, 2 * setup.max_num_batched_tokens)
    prompts = [_batch(1, length, 1) for length in _doublings(SHORT_CONTEXT, longest)]
    return [*workloads, *prompts, _mixed(setup)]


def _decodes(num_seqs: int, context: int, setup: ReplaySetup) -> Workload:
    """A batch that decodes together for a while, at about this context or as long as fits."""
    # All prompts are computed before the first of the batch may end.
    num_prefill_steps = -(-num_seqs * context // setup.max_num_batched_tokens)
    num_output_tokens = num_prefill_steps + NUM_DECODE_STEPS
    room = min(setup.max_model_len, setup.num_blocks // num_seqs * setup.block_size)
    num_prompt_tokens = max(1, min(context, room - num_output_tokens))
    return _batch(num_seqs, num_prompt_tokens, min(num_output_tokens, room - num_prompt_tokens))


def _doublings(first: int, last: int) -> list[int]:
    """first, and what doubling makes of it and of its half more, up to last; and last itself."""
    powers = [first << i for i in range(last.bit_length())]
    return sorted({n for p in powers for n in (p, p + p // 2) if n <= last} | {last})


def _batch(num_seqs: int, num_prompt_tokens: int, num_output_tokens: int) -> Workload:
    """So many equal requests at once."""
    header = TraceHeader(octavo_trace=VERSION, block_size=1)
    request = TraceRequest(
        arrival_s=0.0, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens
    )
    return Workload(header, (request,) * num_seqs)


def _mixed(setup: ReplaySetup) -> Workload:
    """Requests as a trace has them, with lengths of every kind, all at once."""
    size = TraceSize(
        num_requests=NUM_MIXED_REQUESTS,
        max_model_len=min(2048, setup.max_model_len),
        scale=MIXED_SCALE,
        seed=1,  # not the one that traces are usually made with
    )
    return make_workload(RECIPES["sharegpt"], size)
