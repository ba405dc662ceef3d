"""Can these tests fail? Engines with one planted bug each: the swarm must find every one.

Each bug is a few lines that break one method. What finds it may differ (a recount, the fake model's
text, a client's view, a bound on steps); that nothing finds it would mean a blind spot.
"""

import re

import pytest
from msgspec import structs

from octavo.core import FailureCode, FinishReason, RequestEvent, StepPlan, StepResult, Tier
from octavo.engine import EngineCore
from octavo.kvcache import BlockPool
from octavo.scheduler import (
    POLICIES,
    PrefillSpeed,
    QueueBounds,
    SequenceSlots,
    TokenBudget,
)
from octavo.scheduler.siblings import Siblings
from octavo.scheduler.waiting import WaitingRoom
from octavo.sim import FakeExecutor, Parts
from octavo.sim.faults import (
    SqueezableGroupedAllocator,
    SqueezableGroupedPrefixAllocator,
    SqueezablePagedAllocator,
    SqueezablePrefixAllocator,
    SqueezableTieredAllocator,
)
from octavo.sim.parts import (
    create_allocator,
    create_executor,
    create_launch,
    create_scheduler,
)
from octavo.sim.swarm import SwarmFailure, quiet_engine, run_seed

NUM_SEEDS = 500


def allocator_with(broken):
    """Parts whose allocators, with and without prefix caching, have this mixin."""

    class Paged(broken, SqueezablePagedAllocator):
        pass

    class Prefix(broken, SqueezablePrefixAllocator):
        pass

    class Tiered(broken, SqueezableTieredAllocator):
        pass

    def create(setup):
        if setup.allocator != "paged" or not setup.kv_groups.keep_all:
            return create_allocator(setup)
        if setup.num_host_blocks:
            return Tiered(
                setup.num_blocks,
                setup.block_size,
                num_host_blocks=setup.num_host_blocks,
                num_disk_blocks=setup.num_disk_blocks,
            )
        kind = Prefix if setup.prefix_caching else Paged
        return kind(setup.num_blocks, setup.block_size)

    return Parts(allocator=create)


def windows_with(broken):
    """Parts whose allocators of layers with windows have this mixin."""

    class Grouped(broken, SqueezableGroupedAllocator):
        pass

    class GroupedPrefix(broken, SqueezableGroupedPrefixAllocator):
        pass

    def create(setup):
        if setup.kv_groups.keep_all or setup.allocator != "paged":
            return create_allocator(setup)
        kind = GroupedPrefix if setup.prefix_caching else Grouped
        return kind(setup.num_blocks, setup.block_size, groups=setup.kv_groups)

    return Parts(allocator=create)


def executor_with(kind):
    def create(setup):
        executor = create_executor(setup)
        executor.__class__ = kind
        return executor

    return Parts(executor=create)


def core_with(kind):
    return Parts(
        core=lambda scheduler, executor, setup: kind(
            scheduler, executor, launch=create_launch(executor, setup)
        )
    )


class LeaksABlock:
    def free(self, sequence):
        sequence.block_ids = sequence.block_ids[:-1]
        super().free(sequence)


class FreesTwice:
    def free(self, sequence):
        block_ids = list(sequence.block_ids)
        super().free(sequence)
        self._pool.give_back(block_ids[:1])


class GivesTheSameBlockTwice:
    def extend(self, sequence, num_tokens):
        added = super().extend(sequence, num_tokens)
        if len(sequence.block_ids) > 2:
            sequence.block_ids[-1] = sequence.block_ids[0]
        return added


class TellsTheRunnerAnotherBlock:
    def extend(self, sequence, num_tokens):
        first = super().extend(sequence, num_tokens)
        return min(first + 1, len(sequence.block_ids))


class LeavesTooEarly:
    """A window is taken to be a block shorter than it is."""

    def _first_seen(self, num_tokens, window):
        seen = super()._first_seen(num_tokens, window)
        return min(seen + 1, num_tokens // self.block_size)


class NeverLeaves:
    """What a window has left behind is kept."""

    def computed(self, sequence):
        committed, sequence.num_committed_tokens = sequence.num_committed_tokens, 0
        super().computed(sequence)
        sequence.num_committed_tokens = committed


class FindsHalfAWindow:
    """A hit is taken where the last block of a window is there, and what is before it is not."""

    def _hit_in_window(self, sequence, num_blocks, group, window):
        return super()._hit_in_window(sequence, num_blocks, group, 2)

    def _find(self, sequence, index, group):
        found = super()._find(sequence, index, group)
        return 0 if found == self._hole and self._windows[group] else found


class SkipsAPosition:
    """One token more than is true is said to be computed already."""

    def start(self, sequence):
        return min(super().start(sequence) + 1, sequence.num_tokens - 1)


class KeepsStaleKeys:
    """A block that was given out for something else is still found by what it held before."""

    def __init__(self, *arguments, **sizes):
        super().__init__(*arguments, **sizes)

        class Pool(BlockPool):
            def forget(self, block_id):
                pass

        self._pool = Pool(self.num_blocks)


class NamesBlocksTooEarly:
    """A block can be found before its last token is in it."""

    def computed(self, sequence):
        before = sequence.num_committed_tokens
        sequence.num_committed_tokens = min(before + self.block_size - 1, len(sequence.token_ids))
        super().computed(sequence)
        sequence.num_committed_tokens = before


class ForgetsSalts:
    """Tenants who must not, share prefixes."""

    def _key(self, sequence, index):
        salted = sequence.request
        sequence.request = type(salted)(
            request_id=salted.request_id,
            prompt_token_ids=salted.prompt_token_ids,
            sampling=salted.sampling,
            seed=salted.seed,
        )
        try:
            return super()._key(sequence, index)
        finally:
            sequence.request = salted


class WritesToSharedBlocks:
    """No copy on write: siblings write into each other's answers."""

    def _must_copy(self, sequence):
        return False


class ForgetsToCopy:
    """The copy of a shared block is given out, but nothing is copied."""

    def take_transfers(self):
        return tuple(t for t in super().take_transfers() if t.source_tier is not t.target_tier)


class ForgetsTransfers:
    """Blocks are given out as if they had been fetched from below."""

    def take_transfers(self):
        return tuple(t for t in super().take_transfers() if t.target_tier is not Tier.DEVICE)


class SwapsTooLittle:
    """The last block of a swapped sequence stays behind."""

    def take_transfers(self):
        return tuple(t for t in super().take_transfers() if t.key or t.target_tier is not Tier.HOST)


class LeaksHostBlocks:
    def _release(self, places):
        super()._release(places[1:])


class TrustsLostBlocks:
    """A copy that failed is taken for done."""

    def lose(self, transfers):
        pass


class HidesLosses(FakeExecutor):
    def execute(self, plan):
        result = super().execute(plan)
        return StepResult(result.step, result.sampled)


class TrustsDrafts(FakeExecutor):
    """Every guess counts as right."""

    def execute(self, plan):
        result = super().execute(plan)
        drafts = {share.sequence_id: share.draft_ids for share in plan.scheduled}
        sampled = tuple(
            structs.replace(s, token_ids=(*drafts[s.sequence_id], *s.token_ids[-1:]))
            for s in result.sampled
        )
        return structs.replace(result, sampled=sampled)


class LosesSiblings(Siblings):
    """Nobody tells those who wait that their prompt is computed."""

    def released(self):
        return []


class ForgetsToDrop(FakeExecutor):
    """The runner is never told who left."""

    def execute(self, plan: StepPlan) -> StepResult:
        return super().execute(StepPlan(plan.step, plan.new, plan.scheduled, ()))


class WritesToTheWrongSlot(FakeExecutor):
    """The first slot of every second block is written where the next block's is."""

    def _slot(self, row, position, group=0):
        slot = super()._slot(row, position, group)
        is_wrong = position % (2 * self.block_size) == self.block_size
        return (slot + self.block_size) % len(self._slot_tokens) if is_wrong else slot


class LosesAnEvent(EngineCore):
    """Now and then the end of a request is not told."""

    def step(self) -> list[RequestEvent]:
        events = super().step()
        is_lost = self.stats().num_steps % 7 == 0
        return [e for e in events if not (is_lost and e.finish_reason is not None)]


class LosesAToken(EngineCore):
    def step(self) -> list[RequestEvent]:
        events = super().step()
        return events[1:] if self.stats().num_steps % 7 == 0 else events


class TellsAnEndTwice(EngineCore):
    def step(self) -> list[RequestEvent]:
        events = super().step()
        return events + [event for event in events if event.finish_reason is not None]


class FailsEverybody(EngineCore):
    """One failure takes all others with it."""

    def step(self) -> list[RequestEvent]:
        events = super().step()
        if any(event.error is not None for event in events):
            everybody = list(self._scheduler._sequences)
            events += self._scheduler.end(everybody, FinishReason.ERROR, "somebody failed")
        return events


class ManyGiveWay(EngineCore):
    """Where memory runs out, another one ends as well."""

    def step(self) -> list[RequestEvent]:
        events = super().step()
        code = FailureCode.OUT_OF_MEMORY
        if any(event.error_code is code for event in events):
            others = list(self._scheduler._sequences)[:1]
            events += self._scheduler.end(others, FinishReason.ERROR, "gave way", code)
        return events


class NeverExpires(EngineCore):
    """Deadlines pass, and nobody looks."""

    def __init__(self, scheduler, executor, **options):
        super().__init__(scheduler, executor, **options)
        scheduler.expire = list


class ExpiresWhoRuns(EngineCore):
    """A deadline ends those as well whose prompt is being computed."""

    def step(self) -> list[RequestEvent]:
        now_s = self._scheduler._clock.now()
        late = [s.id for s in self._scheduler._running if s.deadline_s < now_s]
        code = FailureCode.DEADLINE_EXCEEDED
        events = self._scheduler.end(late, FinishReason.ERROR, "too late", code)
        return events + super().step()


class FallsAsleep(EngineCore):
    """It looks idle while somebody waits."""

    @property
    def has_work(self):
        return super().has_work and self.stats().num_waiting < 3


class NeverDies(EngineCore):
    def _fail(self, plan, error):
        self._num_failed_steps = 0
        return super()._fail(plan, error)


class IgnoresAborts(EngineCore):
    def abort(self, request_ids: list[str]) -> list[RequestEvent]:
        return super().abort(request_ids[1:])


class LastComeFirstServed(POLICIES["fcfs"]):
    """The oldest waits while younger ones come."""

    def head(self):
        return list(self)[-1] if len(self) else None


class UnfairSlots(SequenceSlots):
    """Whoever has a prompt of five, ten ... tokens never gets a place."""

    def allow(self, sequence, num_tokens):
        return 0 if sequence.num_prompt_tokens % 5 == 0 else super().allow(sequence, num_tokens)


class SlowBudget(TokenBudget):
    """Every other step computes nothing."""

    num_steps = 0

    def begin_step(self, *arguments):
        super().begin_step(*arguments)
        self.num_steps += 1

    def allow(self, sequence, num_tokens):
        return super().allow(sequence, num_tokens) if self.num_steps % 2 else 0


class EndlessBudget(TokenBudget):
    def take(self, sequence, num_tokens):
        pass


class PreemptingBudget(TokenBudget):
    """Who gets no tokens in a step pushes others out of memory that is not short."""

    preempts = True


class SpendsTooMuch(SequenceSlots):
    """One sequence more than there are places."""

    def __init__(self, max_num_seqs):
        super().__init__(max_num_seqs + 1)


class NoBounds(QueueBounds):
    def check(self, *arguments, **numbers):
        pass


def scheduler_with(*, queue=None, constraint=None, replaces=None, bounds=None, siblings=None):
    """Parts whose scheduler has another queue, other bounds, or one constraint for another."""

    def create(allocator, setup, clock):
        scheduler = create_scheduler(allocator, setup, clock)
        if queue is not None and setup.policy == "fcfs":
            scheduler._waiting = WaitingRoom(queue())
        if siblings is not None:
            add = scheduler.add

            def add_broken(*requests):
                add(*requests)
                for group in scheduler._siblings.values():
                    group.__class__ = siblings

            scheduler.add = add_broken
        if bounds is not None:
            scheduler._bounds = bounds(PrefillSpeed())
        if constraint is not None:
            scheduler._constraints = tuple(
                constraint(_limit_of(c)) if type(c) is replaces else c
                for c in scheduler._constraints
            )
        return scheduler

    return Parts(scheduler=create)


def _limit_of(constraint):
    is_budget = isinstance(constraint, TokenBudget)
    return constraint.max_num_batched_tokens if is_budget else constraint.max_num_seqs


PLANTED = {
    "leaked block": allocator_with(LeaksABlock),
    "double free": allocator_with(FreesTwice),
    "block twice in a table": allocator_with(GivesTheSameBlockTwice),
    "wrong block": allocator_with(TellsTheRunnerAnotherBlock),
    "window left too early": windows_with(LeavesTooEarly),
    "window never left": windows_with(NeverLeaves),
    "half a window found": windows_with(FindsHalfAWindow),
    "wrong position": allocator_with(SkipsAPosition),
    "no copy on write": allocator_with(WritesToSharedBlocks),
    "copy on write not copied": allocator_with(ForgetsToCopy),
    "blocks not fetched": allocator_with(ForgetsTransfers),
    "swapped block forgotten": allocator_with(SwapsTooLittle),
    "leaked host block": allocator_with(LeaksHostBlocks),
    "lost block still found": allocator_with(TrustsLostBlocks),
    "lost block not told": executor_with(HidesLosses),
    "drafts not checked": executor_with(TrustsDrafts),
    "siblings forgotten": scheduler_with(siblings=LosesSiblings),
    "wrong slot": executor_with(WritesToTheWrongSlot),
    "stale prefix key": allocator_with(KeepsStaleKeys),
    "prefix named too early": allocator_with(NamesBlocksTooEarly),
    "salt ignored": allocator_with(ForgetsSalts),
    "request not dropped from the runner": executor_with(ForgetsToDrop),
    "lost end": core_with(LosesAnEvent),
    "lost token": core_with(LosesAToken),
    "end told twice": core_with(TellsAnEndTwice),
    "failure spreads": core_with(FailsEverybody),
    "more give way than must": core_with(ManyGiveWay),
    "deadlines forgotten": core_with(NeverExpires),
    "deadlines end who has begun": core_with(ExpiresWhoRuns),
    "idle while somebody waits": core_with(FallsAsleep),
    "alive though all fails": core_with(NeverDies),
    "abort ignored": core_with(IgnoresAborts),
    "starved by younger ones": scheduler_with(queue=LastComeFirstServed),
    "starved for good": scheduler_with(constraint=UnfairSlots, replaces=SequenceSlots),
    "half as fast as promised": scheduler_with(constraint=SlowBudget, replaces=TokenBudget),
    "queue without bound": scheduler_with(bounds=NoBounds),
    "token budget ignored": scheduler_with(constraint=EndlessBudget, replaces=TokenBudget),
    "pushed out for nothing": scheduler_with(constraint=PreemptingBudget, replaces=TokenBudget),
    "one place too many": scheduler_with(constraint=SpendsTooMuch, replaces=SequenceSlots),
}


def find(parts):
    """What the first seed that fails has to say, or None."""
    with quiet_engine():
        for seed in range(NUM_SEEDS):
            try:
                run_seed(seed, parts=parts)
            except SwarmFailure as failure:
                return str(failure)
    return None


@pytest.mark.parametrize("bug", PLANTED)
def test_the_swarm_finds_it(bug):
    found = find(PLANTED[bug])
    assert found is not None, f"{NUM_SEEDS} seeds do not notice: {bug}"
    # Found for what it does, and not because it is planted badly.
    assert "IntegrityError: " in found.splitlines()[1]
    assert not re.search(r"\b(Type|Attribute|Name)Error\b", found)
