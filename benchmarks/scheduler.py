"""What a step costs the scheduler, and how it grows: no model, no device, one core.

    python benchmarks/scheduler.py

Prints the median of planning and of committing a step with R running and W waiting requests.
"""

import statistics
import time

from octavo.core import Request, SampledTokens, SamplingParams, StepPlan, StepResult
from octavo.kvcache import PrefixAllocator
from octavo.scheduler import (
    POLICIES,
    Blocks,
    Scheduler,
    SequenceSlots,
    TokenBudget,
    create_queue,
)

NUM_STEPS = 200


def answer(plan: StepPlan) -> StepResult:
    """What a runner would say, made without one."""
    return StepResult(plan.step, tuple(SampledTokens(s.sequence_id, (5,)) for s in plan.scheduled))


def measure(num_running: int, num_waiting: int, policy: str) -> tuple[float, float]:
    """Medians of `schedule` and `commit`, ms."""
    allocator = PrefixAllocator(num_running * 80)
    constraints = [TokenBudget(2**20), SequenceSlots(num_running), Blocks(allocator)]
    scheduler = Scheduler(allocator, constraints, max_model_len=4096, queue=create_queue(policy))
    for i in range(num_running + num_waiting):
        scheduler.add(
            Request(
                request_id=str(i),
                prompt_token_ids=[i % 500] * 30,
                sampling=SamplingParams(max_tokens=1000),
                seed=0,
            )
        )
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


if __name__ == "__main__":
    main()
