"""The engine loop that serves, in virtual time: what arrives, what goes wrong, what clients see.

Owns the order of things: messages are taken between steps, as the engine process does, and after
every step the books are recounted. `SimulatedEngine` is assembled of `Parts`, so that a test can
put a broken one in. Knows no dice: everything random was decided by who made actions and faults.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from octavo.core import Executor, Request, RequestEvent, SamplingParams, StepPlan
from octavo.engine import EngineCore
from octavo.errors import EngineDeadError, IntegrityError, RequestError
from octavo.scheduler import Blocks, Constraint, Scheduler, SequenceSlots, TokenBudget
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
from octavo.sim.clock import VirtualClock
from octavo.sim.fake_executor import FakeExecutor
from octavo.sim.faults import (
    Fault,
    FaultyExecutor,
    Injection,
    SqueezableAllocator,
    SqueezablePagedAllocator,
    SqueezablePrefixAllocator,
)
from octavo.sim.history import Client, History

MAX_FAILED_STEPS = 2  # in a row; only after so many may an engine end
NUM_TRACED_STEPS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How large an engine is."""

    num_blocks: int = 64
    block_size: int = 16
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 8
    max_model_len: int = 256
    vocab_size: int = 1000
    prefix_caching: bool = True


def create_allocator(limits: Limits) -> SqueezableAllocator:
    """The allocator under test."""
    kind = SqueezablePrefixAllocator if limits.prefix_caching else SqueezablePagedAllocator
    return kind(limits.num_blocks, limits.block_size)


def create_scheduler(allocator: SqueezableAllocator, limits: Limits) -> Scheduler:
    """The scheduler under test."""
    constraints: list[Constraint] = [
        TokenBudget(limits.max_num_batched_tokens),
        SequenceSlots(limits.max_num_seqs),
        Blocks(allocator),
    ]
    return Scheduler(allocator, constraints, max_model_len=limits.max_model_len)


def create_executor(limits: Limits) -> FakeExecutor:
    """What stands in for the model."""
    return FakeExecutor(
        num_blocks=limits.num_blocks, block_size=limits.block_size, vocab_size=limits.vocab_size
    )


def create_core(scheduler: Scheduler, executor: Executor) -> EngineCore:
    """The loop under test."""
    return EngineCore(scheduler, executor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How the pieces of an engine are made."""

    allocator: Callable[[Limits], SqueezableAllocator] = create_allocator
    scheduler: Callable[[SqueezableAllocator, Limits], Scheduler] = create_scheduler
    executor: Callable[[Limits], FakeExecutor] = create_executor
    core: Callable[[Scheduler, Executor], EngineCore] = create_core


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What happened in one step, kept until it is known whether anybody wants to read it."""

    at_s: float
    plan: StepPlan | None
    injections: list[Injection]
    outcome: list[RequestEvent] | Exception

    def __str__(self) -> str:
        lines = [f"t={self.at_s:.4f}s"]
        if self.plan is not None:
            shares = ", ".join(
                f"{s.sequence_id}+{s.num_tokens}{'!' if s.samples else ''}"
                f"{list(s.new_block_ids) or ''}"
                for s in self.plan.scheduled
            )
            lines[0] += f" step {self.plan.step}: {shares or 'nobody runs'}"
            for new in self.plan.new:
                cached = f", {new.num_computed_tokens} computed" if new.num_computed_tokens else ""
                blocks = list(new.block_ids)
                lines.append(
                    f"new {new.sequence_id}: {len(new.token_ids)} tokens{cached}, {blocks}"
                )
            if self.plan.dropped:
                lines.append(f"dropped {', '.join(self.plan.dropped)}")
        lines += [f"fault: {i.fault} ({', '.join(i.request_ids)})" for i in self.injections]
        if isinstance(self.outcome, Exception):
            lines.append(f"raised {type(self.outcome).__name__}: {self.outcome}")
        else:
            lines += [
                f"{e.request_id}: {list(e.token_ids)} {e.finish_reason or ''} {e.error or ''}"
                for e in self.outcome
            ]
        return "\n      ".join(lines)


@dataclass(slots=True)
class Trace:
    """The last steps and actions, for whoever has to understand a failure."""

    entries: deque[TracedStep | tuple[float, Action]] = field(
        default_factory=lambda: deque(maxlen=NUM_TRACED_STEPS)
    )

    def __str__(self) -> str:
        return "\n".join(
            f"  {e}" if isinstance(e, TracedStep) else f"  t={e[0]:.4f}s {_describe(e[1])}"
            for e in self.entries
        )


class SimulatedEngine:
    """An engine core, the world around it, and the record of what clients saw.

    rates, lethal_rate: see `FaultyExecutor`. Anything that breaks a promise raises
    `IntegrityError` where it happens; `trace` then holds the steps before.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        rates: Mapping[Fault, float] | None = None,
        lethal_rate: float = 0.0,
        seed: int = 0,
        parts: Parts | None = None,
    ):
        parts = parts or Parts()
        self.limits = limits
        self.clock = VirtualClock()
        self.history = History(vocab_size=limits.vocab_size, block_size=limits.block_size)
        self.trace = Trace()
        self.num_steps = 0
        self.runner = parts.executor(limits)
        self.executor = FaultyExecutor(
            self.runner, self.clock, random.Random(seed), rates or {}, lethal_rate=lethal_rate
        )
        self.allocator = parts.allocator(limits)
        self.scheduler = parts.scheduler(self.allocator, limits)
        self.core = parts.core(self.scheduler, self.executor)
        self._is_draining = False

    def run(self, actions: Iterable[Action]) -> History:
        """Let all this happen, in order of time, then heal everything and answer who is left."""
        for action in sorted(actions, key=lambda action: action.at_s):
            self._step_until(action.at_s)
            if self.history.engine_died:
                return self.history
            self._apply(action)
        self.settle()
        return self.history

    def settle(self) -> None:
        """Heal every fault and step until nobody is left; raises where that takes too long."""
        self.executor.heal()
        self.allocator.num_hidden_blocks = 0
        last_step = self._step_when_idle()
        while self.core.has_work and not self.history.engine_died:
            if self.num_steps >= last_step:
                raise IntegrityError(f"{sorted(self.history.live)} are starved: no end in sight")
            self.step()

    def probe(self) -> None:
        """An idle engine must be as good as new: it knows an answer, and holds nothing else."""
        stats = self.core.stats()
        if stats.num_free_blocks != stats.num_blocks:
            raise IntegrityError(
                f"{stats.num_blocks - stats.num_free_blocks} blocks never came back"
            )
        sampling = SamplingParams(max_tokens=1)
        self._arrive(Request(request_id="probe", prompt_token_ids=[1], sampling=sampling, seed=0))
        self.settle()
        if self.runner.num_rows > 1:
            raise IntegrityError(f"the runner keeps {self.runner.num_rows - 1} rows of nobody")

    def step(self) -> None:
        """One step of the engine; then clients read their news and the books are recounted."""
        self.num_steps += 1
        self.executor.last_plan = None
        outcome: list[RequestEvent] | Exception = []
        try:
            outcome = self.core.step()
        except Exception as error:
            outcome = error
        injections = self.executor.take_injections()
        plan = self.executor.last_plan
        self.trace.entries.append(TracedStep(self.clock.now(), plan, injections, outcome))
        if self.executor.unexpected is not None:
            raise IntegrityError("the executor cannot carry the plan out") from (
                self.executor.unexpected
            )
        for injection in injections:
            self.history.touch(injection)
        if isinstance(outcome, Exception):
            self._note_death(outcome)
            return
        self._tell(outcome)
        self._recount()

    def num_service_steps(self, client: Client) -> int:
        """How many steps a request takes at most once it is the oldest, whatever it went through.

        The oldest request runs in every step: it is first in line for tokens and places, younger
        ones give way to it, and alone it fits the pool, or it would have been refused. So it is
        computed, perhaps from scratch after preemption, in `max_num_batched_tokens` a step, and
        then each step gives it a token. While nobody hides blocks from the engine, a request must
        therefore be answered within the sum of these numbers over all that were there when it came.
        """
        num_tokens = client.max_num_tokens
        num_output = num_tokens - len(client.request.prompt_token_ids)
        return -(-num_tokens // self.limits.max_num_batched_tokens) + num_output

    def _step_until(self, at_s: float) -> None:
        """Serve until it is that late; an engine without work sleeps."""
        while self.clock.now() < at_s and not self.history.engine_died:
            if self.core.has_work:
                self.step()
            else:
                self.clock.advance(at_s - self.clock.now())

    def _apply(self, action: Action) -> None:
        self.trace.entries.append((self.clock.now(), action))
        match action:
            case Arrive(request=request):
                self._arrive(request)
            case Cancel(request_ids=request_ids):
                self._cancel(list(request_ids))
            case CancelEverybody():
                self._cancel(list(self.history.live))
            case Squeeze(num_blocks=num_blocks):
                self._squeeze(num_blocks)
            case JumpWallClock(seconds=seconds):
                self.clock.jump_wall(seconds)
            case Pause(seconds=seconds):
                self.clock.advance(seconds)
            case Drain():
                self._is_draining = True
        self._recount()

    def _arrive(self, request: Request) -> None:
        if self._is_draining:
            self.history.refuse()
            return
        room = self.limits.max_model_len - len(request.prompt_token_ids)
        max_tokens = request.sampling.max_tokens or room
        must_refuse = self._must_refuse(request, max_tokens)
        try:
            self.core.add(request)
        except RequestError as error:
            if not must_refuse:
                raise IntegrityError(f"{request.request_id} was refused: {error}") from error
            self.history.refuse()
            return
        if must_refuse:
            raise IntegrityError(f"{request.request_id} can never run, but was accepted")
        client = self.history.accept(
            request, max_tokens, at_s=self.clock.now(), step=self.num_steps
        )
        if not self.allocator.num_hidden_blocks:
            client.due_step = self._step_when_idle()

    def _must_refuse(self, request: Request, max_tokens: int) -> bool:
        """Whether a request can never run: no tokens, no context, no memory, or its id is taken."""
        limits = self.limits
        num_tokens = len(request.prompt_token_ids) + max_tokens
        num_blocks = -(-(num_tokens - 1) // limits.block_size)
        return (
            not request.prompt_token_ids
            or max_tokens < 1
            or num_tokens > limits.max_model_len
            or num_blocks > limits.num_blocks
            or request.request_id in self.history.live
        )

    def _step_when_idle(self) -> int:
        """By when all who are here must have been answered."""
        return self.num_steps + sum(map(self.num_service_steps, self.history.live.values()))

    def _squeeze(self, num_blocks: int) -> None:
        """Memory gets scarce, or comes back; who lived through it has no due time."""
        self.allocator.num_hidden_blocks = num_blocks
        for client in self.history.live.values():
            client.due_step = None

    def _cancel(self, request_ids: list[str]) -> None:
        self.history.cancel(request_ids)
        self._tell(self.core.abort(request_ids))
        left = [i for i in request_ids if i in self.history.live]
        if left:
            raise IntegrityError(f"{left} were aborted and live on")

    def _tell(self, events: list[RequestEvent]) -> None:
        for event in events:
            self.history.note(event, at_s=self.clock.now(), step=self.num_steps)

    def _note_death(self, error: Exception) -> None:
        """An engine may end, loudly, when its steps keep failing, and for nothing else."""
        failures = self.executor.num_failures_in_a_row
        if not isinstance(error, EngineDeadError) or failures < MAX_FAILED_STEPS:
            raise IntegrityError(f"the engine died after {failures} failed steps") from error
        self.history.die(at_s=self.clock.now(), step=self.num_steps)

    def _recount(self) -> None:
        """The books against themselves, and against what clients know."""
        self.scheduler.check_integrity()
        stats = self.core.stats()
        if stats.num_running + stats.num_waiting != len(self.history.live):
            raise IntegrityError(
                f"{stats.num_running} run and {stats.num_waiting} wait, but "
                f"{len(self.history.live)} clients have no end: {sorted(self.history.live)}"
            )
        if stats.num_running > self.limits.max_num_seqs:
            raise IntegrityError(f"{stats.num_running} run at once")


def _describe(action: Action) -> str:
    match action:
        case Arrive(request=request):
            sampling = request.sampling
            salt = request.options.cache_salt
            return (
                f"{request.request_id} arrives: {len(request.prompt_token_ids)} prompt tokens, "
                f"at most {sampling.max_tokens}, salt {salt}"
            )
        case _:
            return str(action)
