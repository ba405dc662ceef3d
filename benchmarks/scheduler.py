"""What a step costs the scheduler, and how it grows: no model, no device, one core.

    python benchmarks/scheduler.py

Prints the median of planning and of committing a step with R running and W waiting requests, and
what decision records and prefix caching cost.
"""

import statistics
import time
from collections.abc import Callable

from octavo.core import (
    Request,
    SampledTokens,
    SamplingParams,
    StepPlan,
    StepResult,
    SystemClock,
)
from octavo.kvcache import PagedAllocator, PrefixAllocator
from octavo.scheduler import (
    POLICIES,
    Blocks,
    DecisionLog,
    Scheduler,
    SequenceSlots,
    TokenBudget,
    create_queue,
)

NUM_STEPS = 200
NUM_ROUNDS = 7


def answer(plan: StepPlan) -> StepResult:
    """What a runner would say, made without one."""
    return StepResult(plan.step, tuple(SampledTokens(s.sequence_id, (5,)) for s in plan.scheduled))


class SilentLog(DecisionLog):
    """Keeps no stories: what decision records cost is the difference."""

    def _ignore(self, *arguments: object) -> None:
        pass

    arrives = waits = runs = held_back = preempted = ends = _ignore


def create_scheduler(num_running: int, policy: str, allocator: PagedAllocator) -> Scheduler:
    constraints = [TokenBudget(2**20), SequenceSlots(num_running), Blocks(allocator)]
    return Scheduler(allocator, constraints, max_model_len=4096, queue=create_queue(policy))


def create_request(i: int, num_prompt_tokens: int, max_tokens: int) -> Request:
    return Request(
        request_id=str(i),
        prompt_token_ids=[i % 500] * num_prompt_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
    )


def measure(
    num_running: int, num_waiting: int, policy: str, *, records: bool = True
) -> tuple[float, float]:
    """Medians of `schedule` and `commit`, ms."""
    scheduler = create_scheduler(num_running, policy, PrefixAllocator(num_running * 80))
    if not records:
        scheduler.decisions = SilentLog(SystemClock())
    for i in range(num_running + num_waiting):
        scheduler.add(create_request(i, 30, 1000))
    plan = scheduler.schedule()
    scheduler.commit(plan, answer(plan))
    planning, committing = [], []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        result = answer(plan)
        answered = time.perf_counter()
        scheduler.commit(plan, result)
        planning.append(planned - start)
        committing.append(time.perf_counter() - answered)
    return 1e3 * statistics.median(planning), 1e3 * statistics.median(committing)


def prompt_us(kind: type[PagedAllocator]) -> float:
    """Microseconds of scheduling for a prompt of 1,000 tokens that nobody sent before."""
    scheduler = create_scheduler(1, "fcfs", kind(100))
    seconds = []
    for i in range(NUM_STEPS):
        scheduler.add(create_request(i, 1000, 1))
        start = time.perf_counter()
        plan = scheduler.schedule()
        scheduler.commit(plan, answer(plan))
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def compare(with_it: Callable[[], float], without: Callable[[], float]) -> tuple[float, float]:
    """Medians of both, measured in turn, so that a change of the machine's speed hits both."""
    pairs = [(with_it(), without()) for _ in range(NUM_ROUNDS)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def main() -> None:
    print(f"{'running':>8}{'waiting':>8}  {'policy':<10}{'plan ms':>9}{'commit ms':>11}")
    for num_running in (1, 16, 64, 256, 1024):
        for num_waiting in (0, 1000):
            plan_ms, commit_ms = measure(num_running, num_waiting, "fcfs")
            print(
                f"{num_running:>8}{num_waiting:>8}  {'fcfs':<10}{plan_ms:>9.3f}{commit_ms:>11.3f}"
            )
    for policy in sorted(POLICIES):
        plan_ms, commit_ms = measure(256, 1000, policy)
        print(f"{256:>8}{1000:>8}  {policy:<10}{plan_ms:>9.3f}{commit_ms:>11.3f}")
    kept, silent = compare(
        lambda: sum(measure(256, 1000, "fcfs")),
        lambda: sum(measure(256, 1000, "fcfs", records=False)),
    )
    print(
        f"decision records: a step takes {kept:.3f} ms with and {silent:.3f} ms without: "
        f"{100 * (kept / silent - 1):+.1f}%"
    )
    prefix, paged = compare(lambda: prompt_us(PrefixAllocator), lambda: prompt_us(PagedAllocator))
    print(
        f"prefix caching without a hit: {prefix:.0f} us for a prompt of 1,000 tokens with and "
        f"{paged:.0f} us without"
    )


if __name__ == "__main__":
    main()
