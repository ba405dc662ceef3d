"""What a simulated engine is made of, and how large. Knows no faults and no workload.

`Parts` holds one factory for each piece, so that a test can put a broken one in.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from octavo import scheduler
from octavo.core import Clock, Executor, KVGroups, Launch, PendingResult, StepPlan, StepResult
from octavo.engine import EngineCore
from octavo.scheduler import Scheduler, SchedulerSettings
from octavo.sim.fake_executor import FakeExecutor
from octavo.sim.faults import (
    SqueezableAllocator,
    SqueezableBuddyAllocator,
    SqueezableContiguousAllocator,
    SqueezableGroupedAllocator,
    SqueezableGroupedPrefixAllocator,
    SqueezablePagedAllocator,
    SqueezablePrefixAllocator,
    SqueezableTieredAllocator,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """How large a simulated engine is, and by which rules it serves.

    allocator: contiguous, contiguous-buddy or paged; the next three need pages.
    num_host_blocks, num_disk_blocks: memory below the device, which needs prefix caching.
    windows: of each group of layers, where blocks are paged and all of them on the device.
    policy, batching, preemption: names known to `octavo.scheduler`.
    num_drafts: tokens that the executor guesses ahead.
    asynchronous: step n+1 is launched before the result of step n is read.
    eager: whether a launched step has run by then, or runs when its result is read; in truth the
        device decides, and both must give the same answers.
    """

    num_blocks: int = 64
    block_size: int = 16
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 8
    max_model_len: int = 256
    max_num_queued: int | None = None
    vocab_size: int = 1000
    allocator: str = "paged"
    prefix_caching: bool = True
    windows: tuple[int | None, ...] = (None,)
    num_host_blocks: int = 0
    num_disk_blocks: int = 0
    preemption: str = "recompute"
    copy_block_s: float = 0.002  # what copying a block seems to take; only the cost model asks
    num_drafts: int = 0
    policy: str = "fcfs"
    batching: str = "chunked"
    asynchronous: bool = False
    eager: bool = True

    @property
    def kv_groups(self) -> KVGroups:
        """What each group of layers keeps of a sequence."""
        return KVGroups(self.windows, self.max_num_batched_tokens)

    @property
    def is_orderly(self) -> bool:
        """Whether requests are served strictly by age, so that their waiting has a known bound."""
        return self.policy == "fcfs" and self.batching == "chunked"


class InlineLauncher:
    """Runs launched steps in the caller's thread, now or when they are waited for: no races.

    Stands in for the device that works beside the scheduler; steps are done in order.
    """

    def __init__(self, executor: Executor, *, eager: bool):
        self._executor = executor
        self._eager = eager

    def launch(self, plan: StepPlan) -> PendingResult:
        """Begin a step."""
        future = _InlineFuture(lambda: self._executor.execute(plan))
        if self._eager:
            future.run()
        return future


class _InlineFuture(Future[StepResult]):
    """Work that is done at the latest when somebody waits for it."""

    def __init__(self, work: Callable[[], StepResult]):
        super().__init__()
        self._work = work

    def run(self) -> None:
        try:
            self.set_result(self._work())
        except Exception as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> StepResult:
        if not self.done():
            self.run()
        return super().result(timeout)


def create_allocator(setup: EngineSetup) -> SqueezableAllocator:
    """The allocator under test."""
    if setup.allocator == "contiguous":
        return SqueezableContiguousAllocator(
            setup.num_blocks, setup.block_size, max_model_len=setup.max_model_len
        )
    if setup.allocator == "contiguous-buddy":
        return SqueezableBuddyAllocator(setup.num_blocks, setup.block_size)
    if setup.num_host_blocks:
        return SqueezableTieredAllocator(
            setup.num_blocks,
            setup.block_size,
            num_host_blocks=setup.num_host_blocks,
            num_disk_blocks=setup.num_disk_blocks,
        )
    if not setup.kv_groups.keep_all:
        grouped = (
            SqueezableGroupedPrefixAllocator if setup.prefix_caching else SqueezableGroupedAllocator
        )
        return grouped(setup.num_blocks, setup.block_size, groups=setup.kv_groups)
    kind = SqueezablePrefixAllocator if setup.prefix_caching else SqueezablePagedAllocator
    return kind(setup.num_blocks, setup.block_size)


def create_scheduler(allocator: SqueezableAllocator, setup: EngineSetup, clock: Clock) -> Scheduler:
    """The scheduler under test."""
    settings = SchedulerSettings(
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_num_seqs=setup.max_num_seqs,
        max_model_len=setup.max_model_len,
        policy=setup.policy,
        batching=setup.batching,
        preemption_mode=setup.preemption,
        copy_block_s=setup.copy_block_s,
        max_num_queued_reqs=setup.max_num_queued,
    )
    return scheduler.create_scheduler(allocator, settings, clock=clock)


def create_executor(setup: EngineSetup) -> FakeExecutor:
    """What stands in for the model."""
    return FakeExecutor(
        num_blocks=setup.num_blocks,
        block_size=setup.block_size,
        vocab_size=setup.vocab_size,
        num_host_blocks=setup.num_host_blocks,
        num_disk_blocks=setup.num_disk_blocks,
        windows=setup.windows,
        num_drafts=setup.num_drafts,
    )


def create_launch(executor: Executor, setup: EngineSetup) -> Launch | None:
    """How steps are begun ahead of their results, where they are."""
    if not setup.asynchronous:
        return None
    return InlineLauncher(executor, eager=setup.eager).launch


def create_core(scheduler: Scheduler, executor: Executor, setup: EngineSetup) -> EngineCore:
    """The loop under test."""
    return EngineCore(scheduler, executor, launch=create_launch(executor, setup))


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How the pieces of an engine are made."""

    allocator: Callable[[EngineSetup], SqueezableAllocator] = create_allocator
    scheduler: Callable[[SqueezableAllocator, EngineSetup, Clock], Scheduler] = create_scheduler
    executor: Callable[[EngineSetup], FakeExecutor] = create_executor
    core: Callable[[Scheduler, Executor, EngineSetup], EngineCore] = create_core
