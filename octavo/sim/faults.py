"""What can go wrong below the engine: slow, failing and lying executors, and scarce memory.

Owns the faults and the dice that choose them. Every injection is written down with the requests it
touched, so that whoever checks the outcome knows whom the fault may have hurt, and nobody else.
Knows no oracle.
"""

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from octavo.core import Executor, SampledTokens, ScheduledTokens, StepPlan, StepResult
from octavo.kvcache import (
    Allocator,
    BuddyAllocator,
    ContiguousAllocator,
    GroupedAllocator,
    GroupedPrefixAllocator,
    PagedAllocator,
    PrefixAllocator,
    TieredAllocator,
)
from octavo.sim.clock import VirtualClock


class Fault(enum.StrEnum):
    """One way in which a step goes wrong."""

    SLOW = "slow step"
    FAIL_BEFORE = "failure before the plan was applied"
    FAIL_MIDWAY = "failure when half of the plan was applied"
    FAIL_AFTER = "failure after the plan was applied"
    OUT_OF_MEMORY = "out of memory"
    LATE_REPLY = "the reply of another step"
    NOT_FINITE = "logits of one sequence are not finite"
    LOST_REPLY = "one sequence is missing from the reply"
    DOUBLE_REPLY = "one sequence is in the reply twice"
    FOREIGN_REPLY = "the reply has a token that nobody asked for"
    LOST_BLOCK = "a block did not arrive from another tier"
    CONSEQUENCE = "the step before failed when this one was launched"  # not drawn


# A step that gives nothing that can be used: everyone in it may fail.
STEP_FAILURES = frozenset(
    {
        Fault.FAIL_BEFORE,
        Fault.FAIL_MIDWAY,
        Fault.FAIL_AFTER,
        Fault.OUT_OF_MEMORY,
        Fault.LATE_REPLY,
    }
)
# A reply that does not match its plan: the engine may mend it, or distrust the whole step.
WRONG_REPLIES = frozenset({Fault.LOST_REPLY, Fault.DOUBLE_REPLY, Fault.FOREIGN_REPLY})


class Injection(NamedTuple):
    """A fault that was injected, and the requests whose outcome it may change."""

    step: int
    fault: Fault
    request_ids: tuple[str, ...]


class InjectedError(RuntimeError):
    """A step that fails on purpose."""


class FaultableExecutor(Executor, Protocol):
    """An executor whose KV memory can be spoiled."""

    def poison(self, sequence_id: str, num_tokens: int) -> None:
        """The KV of the last `num_tokens` computed tokens of a sequence is not finite."""
        ...

    def fail_transfer(self, index: int) -> None:
        """This copy of the next step's fails."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Which steps go wrong.

    rates: the chance of each fault in a step; a fault that is absent is not drawn.
    lethal_rate: the chance that a step may fail though the one before did, which ends the engine.
    at_steps: faults that happen at these steps, whatever the dice say.
    seed: what the dice are made of.
    """

    rates: Mapping[Fault, float] = field(default_factory=dict)
    lethal_rate: float = 0.0
    at_steps: Mapping[int, Fault] = field(default_factory=dict)
    seed: int = 0


class FaultyExecutor:
    """Runs plans on another executor in virtual time, and lets some of them go wrong.

    runs_ahead: a step is launched before it is known whether the one before failed. It then finds
        the executor in a state that its plan does not know, and whatever comes of it counts as a
        consequence: its requests may fail, too, but it is no second failure.
    """

    BASE_S = 0.010
    SECONDS_PER_TOKEN = 0.0005
    SLOWDOWN = 50.0

    def __init__(
        self,
        executor: FaultableExecutor,
        clock: VirtualClock,
        faults: Faults,
        *,
        runs_ahead: bool = False,
    ):
        self._executor = executor
        self._clock = clock
        self._rng = random.Random(faults.seed)
        self._rates = tuple(faults.rates.items())
        self._lethal_rate = faults.lethal_rate
        self._at_steps = faults.at_steps
        self._runs_ahead = runs_ahead
        self._is_consequence = False  # the plan was launched while a failure was on its way
        self._last_result: StepResult | None = None
        self._new_injections: list[Injection] = []
        self.num_failures_in_a_row = 0
        self.num_sure_failures_in_a_row = 0  # the same, but a wrong reply may have been mended
        self._last_plan: StepPlan | None = None
        self.unexpected: Exception | None = None  # the executor's own: a plan it cannot carry out

    def heal(self) -> None:
        """No dice from now on."""
        self._rates = ()

    def take_injections(self) -> list[Injection]:
        """What was injected since the last call."""
        taken, self._new_injections = self._new_injections, []
        return taken

    def take_plan(self) -> StepPlan | None:
        """The plan that was executed last, unless it was taken before."""
        taken, self._last_plan = self._last_plan, None
        return taken

    def execute(self, plan: StepPlan) -> StepResult:
        self._last_plan = plan
        fault = None if self._is_consequence else self._draw(plan.step)
        seconds = self.BASE_S + self.SECONDS_PER_TOKEN * plan.num_tokens
        if fault is Fault.SLOW:
            self._note(plan, fault)
            seconds *= self.SLOWDOWN
        self._clock.advance(seconds)
        if self._is_consequence:
            self._is_consequence = False
            self._note(plan, Fault.CONSEQUENCE, plan.scheduled)
            return self._executor.execute(plan)
        if fault in STEP_FAILURES:
            self.num_sure_failures_in_a_row += 1
            self._note_failure(plan, fault)
            return self._fail(plan, fault)
        self.num_sure_failures_in_a_row = 0
        if fault is Fault.LOST_BLOCK:
            self._lose_block(plan)
        result = self._last_result = self._run(plan)
        spoilt = result if fault is None else self._spoil(plan, result, fault)
        if fault in WRONG_REPLIES and spoilt is not result:
            self._note_failure(plan, fault)
        else:
            self.num_failures_in_a_row = 0
        return spoilt

    def _draw(self, step: int) -> Fault | None:
        """The fault of this step, if any."""
        if step in self._at_steps:
            return self._at_steps[step]
        for fault, rate in self._rates:
            if self._rng.random() < rate:
                if fault in STEP_FAILURES | WRONG_REPLIES and self.num_failures_in_a_row:
                    return fault if self._rng.random() < self._lethal_rate else None
                return fault
        return None

    def _run(self, plan: StepPlan) -> StepResult:
        try:
            return self._executor.execute(plan)
        except Exception as error:
            self.unexpected = error
            raise

    def _fail(self, plan: StepPlan, fault: Fault | None) -> StepResult:
        """A step that gives nothing, or the answer to another one."""
        match fault:
            case Fault.FAIL_MIDWAY:
                half = plan.scheduled[: len(plan.scheduled) // 2]
                copies = plan.transfers[: len(plan.transfers) // 2]
                self._run(StepPlan(plan.step, plan.new, half, plan.dropped, copies))
            case Fault.FAIL_AFTER:
                self._run(plan)
            case Fault.OUT_OF_MEMORY:
                if self._rng.random() < 0.5:
                    self._run(plan)
                raise MemoryError("injected")
            case Fault.LATE_REPLY:
                result = self._run(plan)
                return self._last_result or StepResult(plan.step + 1, result.sampled)
        raise InjectedError(fault)

    def _spoil(self, plan: StepPlan, result: StepResult, fault: Fault) -> StepResult:
        """The result as it arrives: wrong for one sequence, if there is one to hurt."""
        sampled = result.sampled
        if fault is Fault.FOREIGN_REPLY:
            unasked = [share.sequence_id for share in plan.scheduled if not share.samples]
            foreign = SampledTokens(self._rng.choice([*unasked, "nobody"]), (0,))
            return StepResult(result.step, (*sampled, foreign))
        if fault in (Fault.SLOW, Fault.LOST_BLOCK) or not sampled:
            return result
        victim = self._rng.choice(sampled)
        others = tuple(token for token in sampled if token is not victim)
        if fault is Fault.LOST_REPLY:
            return StepResult(result.step, others)
        if fault is Fault.DOUBLE_REPLY:
            return StepResult(result.step, (*sampled, victim))
        share = next(s for s in plan.scheduled if s.sequence_id == victim.sequence_id)
        self._note(plan, fault, (share,))
        self._executor.poison(share.sequence_id, share.num_tokens - len(share.draft_ids))
        failed = SampledTokens(victim.sequence_id, (), error="the logits are not finite")
        return StepResult(result.step, (failed, *others))

    def _lose_block(self, plan: StepPlan) -> None:
        """One copy between tiers fails, if there is one. Copies on a device do not."""
        able = [
            index
            for index, transfer in enumerate(plan.transfers)
            if transfer.source_tier is not transfer.target_tier
        ]
        if able:
            self._executor.fail_transfer(self._rng.choice(able))
            self._note(plan, Fault.LOST_BLOCK)

    def _note_failure(self, plan: StepPlan, fault: Fault) -> None:
        """This step may fail for everyone in it."""
        self.num_failures_in_a_row += 1
        self._is_consequence = self._runs_ahead
        self._note(plan, fault, plan.scheduled)

    def _note(
        self, plan: StepPlan, fault: Fault, touched: tuple[ScheduledTokens, ...] = ()
    ) -> None:
        request_ids = tuple(share.sequence_id for share in touched)
        self._new_injections.append(Injection(plan.step, fault, request_ids))


class SqueezableAllocator(Allocator, Protocol):
    """An allocator some of whose free blocks can be hidden for a while."""

    num_hidden_blocks: int


class _Squeezable:
    """While `num_hidden_blocks` is not 0, so many of the next class's free blocks seem taken."""

    num_hidden_blocks = 0

    @property
    def num_free_blocks(self) -> int:
        free: int = super().num_free_blocks  # type: ignore[misc]
        return max(0, free - self.num_hidden_blocks)


class SqueezableContiguousAllocator(_Squeezable, ContiguousAllocator):
    """One run for the longest sequence."""


class SqueezableBuddyAllocator(_Squeezable, BuddyAllocator):
    """One run for the request's own maximum."""


class SqueezablePagedAllocator(_Squeezable, PagedAllocator):
    """Blocks on demand."""


class SqueezablePrefixAllocator(_Squeezable, PrefixAllocator):
    """The same with prefix caching."""


class SqueezableGroupedAllocator(_Squeezable, GroupedAllocator):
    """Blocks on demand, given back behind windows."""


class SqueezableGroupedPrefixAllocator(_Squeezable, GroupedPrefixAllocator):
    """The same with prefix caching."""


class SqueezableTieredAllocator(_Squeezable, TieredAllocator):
    """The same with memory below the device."""
