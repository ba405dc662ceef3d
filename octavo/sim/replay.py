"""Replays a trace through the real scheduler: in virtual time, or on a real executor and clock.

Owns the engine that is replayed on, the executor that stands in for a model, and the order of
things: arrivals at their times, then a step, then clients read their tokens. A `Machine` says what
time is and who runs steps; everything else is the same for all of them, so that two machines differ
in nothing but speed. Knows no tensors.
"""

import dataclasses
from array import array
from dataclasses import dataclass, field
from typing import Protocol

from octavo.config import option
from octavo.core import (
    Clock,
    FailureCode,
    Launch,
    PendingResult,
    Request,
    RequestEvent,
    RequestOptions,
    SampledTokens,
    SamplingParams,
    StepPlan,
    StepResult,
)
from octavo.engine import EngineCore
from octavo.errors import (
    ConfigError,
    IntegrityError,
    OctavoError,
    OverloadedError,
    RequestError,
)
from octavo.kvcache import ALLOCATORS, create_allocator
from octavo.scheduler import (
    BATCHINGS,
    POLICIES,
    Scheduler,
    SchedulerSettings,
    create_scheduler,
)
from octavo.sim.clock import VirtualClock
from octavo.sim.step_time import ShapeTracker, StepTimes, TimedStep
from octavo.sim.workload import TraceRequest, Workload, prompt_token_ids

IDLE_S = 0.001  # between two looks at an engine that has work and cannot do any yet
TICK_S = 1e-6  # nobody waits for less: a clock that is far on would not move at all
MAX_IDLE_LOOKS = 100_000  # in a row; more of them means that the engine is stuck


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSizes:
    """How large the replayed engine is. Its fields are flags.

    Raises:
        ConfigError: a size is not positive.
    """

    num_blocks: int = option(2048, "KV blocks in the pool")
    block_size: int = option(16, "tokens in a KV block")
    max_model_len: int = option(2048, "longest prompt and output together, in tokens")
    max_num_seqs: int = option(32, "sequences that run at once")
    max_num_batched_tokens: int = option(512, "tokens that one step computes")

    def __post_init__(self) -> None:
        for size in dataclasses.fields(EngineSizes):
            if getattr(self, size.name) < 1:
                raise ConfigError(f"{size.name} must be at least 1, got {getattr(self, size.name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySetup(EngineSizes):
    """How large the replayed engine is, and by which rules it serves. Its fields are flags."""

    policy: str = option("fcfs", "who goes first", tuple(POLICIES))
    batching: str = option("chunked", "how a step is filled", BATCHINGS)
    allocator: str = option("paged+prefix", "how KV memory is given", ALLOCATORS)
    async_scheduling: bool = option(False, "plan the next step while the last one runs")


class StepExecutor(Protocol):
    """An executor that writes down the shape and the time of every step."""

    steps: list[TimedStep]

    def execute(self, plan: StepPlan) -> StepResult: ...


class Machine(Protocol):
    """Where a trace is replayed."""

    vocab_size: int

    @property
    def clock(self) -> Clock:
        """What time it is."""
        ...

    def start(self, setup: ReplaySetup) -> tuple[StepExecutor, Launch | None]:
        """An executor with an empty KV memory, and who launches its steps where they run ahead."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        ...


class SimulatedExecutor:
    """Takes the time that a model would and answers token 0. Sole writer of its steps."""

    def __init__(self, times: StepTimes, clock: VirtualClock, *, asynchronous: bool):
        self.steps: list[TimedStep] = []
        self.done_s = 0.0  # when the last step that was launched is over
        self._times = times
        self._clock = clock
        self._asynchronous = asynchronous
        self._tracker = ShapeTracker()

    def execute(self, plan: StepPlan) -> StepResult:
        """Host time passes first, then the device works; asynchronously nobody waits for it yet."""
        shape = self._tracker.observe(plan)
        host_s, seconds = self._times.host_seconds(shape), self._times.seconds(shape)
        self._clock.advance(host_s)
        self.done_s = max(self.done_s, self._clock.now()) + seconds
        if not self._asynchronous:
            self._clock.advance(seconds)
        self.steps.append(TimedStep(shape=shape, seconds=seconds, host_s=host_s))
        sampled = [SampledTokens(s.sequence_id, (0,)) for s in plan.scheduled if s.samples]
        return StepResult(plan.step, tuple(sampled))

    def launch(self, plan: StepPlan) -> PendingResult:
        """Begin a step; whoever reads its result waits until it is there."""
        return _Landing(self.execute(plan), self.done_s, self._clock)


class _Landing:
    """The result of a launched step, to be had when its time has come."""

    def __init__(self, result: StepResult, done_s: float, clock: VirtualClock):
        self._result = result
        self._done_s = done_s
        self._clock = clock

    def result(self) -> StepResult:
        self._clock.advance(max(0.0, self._done_s - self._clock.now()))
        return self._result


class SimulatedMachine:
    """A machine that is a step-time model and a clock to turn."""

    def __init__(self, times: StepTimes):
        self.clock = VirtualClock()
        self.times = times
        self.vocab_size = times.recorded.vocab_size

    def start(self, setup: ReplaySetup) -> tuple[StepExecutor, Launch | None]:
        executor = SimulatedExecutor(self.times, self.clock, asynchronous=setup.async_scheduling)
        executor.done_s = self.clock.now()
        return executor, executor.launch if setup.async_scheduling else None

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)


def _replayed_scheduler(setup: ReplaySetup, clock: Clock) -> Scheduler:
    """The scheduler that serves, with an open queue."""
    allocator = create_allocator(
        setup.allocator, setup.num_blocks, setup.block_size, max_model_len=setup.max_model_len
    )
    settings = SchedulerSettings(
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_num_seqs=setup.max_num_seqs,
        max_model_len=setup.max_model_len,
        policy=setup.policy,
        batching=setup.batching,
    )
    return create_scheduler(allocator, settings, clock=clock)


@dataclass(slots=True)
class Client:
    """One request of a trace and what came of it. Times in seconds since the trace began."""

    request: TraceRequest
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    num_cached_tokens: int = 0
    refusal: str | None = None  # why the engine did not take it, or computed nothing of it


@dataclass(frozen=True, slots=True)
class Moment:
    """The engine after a step. Seconds since the trace began."""

    at_s: float
    num_running: int
    num_waiting: int
    num_used_blocks: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Everything that was seen while a trace was replayed."""

    setup: ReplaySetup
    clients: list[Client]
    moments: list[Moment]
    steps: list[TimedStep]
    num_preemptions: int


def replay(workload: Workload, setup: ReplaySetup, machine: Machine) -> Replay:
    """Send a trace's requests to an engine at their times; return when all are answered.

    Every request gets exactly as many tokens as the trace says. The same trace and setup give the
    same replay on a simulated machine.

    Raises:
        ConfigError: a request of the trace can never run on this engine.
    """
    return _Replayer(workload, setup, machine).run()


class _Replayer:
    """The loop around an engine core. Sole writer of clients and moments."""

    def __init__(self, workload: Workload, setup: ReplaySetup, machine: Machine):
        self._machine = machine
        self._setup = setup
        self._executor, launch = machine.start(setup)
        self._core = EngineCore(
            _replayed_scheduler(setup, machine.clock),
            self._executor,
            launch=launch,
        )
        self._clients = [Client(request) for request in workload.requests]
        # Made beforehand: a client's work is not the engine's time.
        self._requests = [
            _request(trace_request, index, workload.header.block_size, machine.vocab_size)
            for index, trace_request in enumerate(workload.requests)
        ]
        self._num_sent = 0
        self._num_idle_looks = 0  # in a row
        self._moments: list[Moment] = []
        self._loop_s: list[float] = []
        self._start_s = 0.0

    def run(self) -> Replay:
        self._start_s = self._machine.clock.now()
        while self._core.has_work or self._num_sent < len(self._requests):
            start_s = self._now()
            self._send_due()
            if self._core.has_work:
                self._step(start_s)
            else:
                self._wait_for_next(float("inf"))
                self._look()
        num_preemptions = self._core.stats().num_preemptions
        return Replay(self._setup, self._clients, self._moments, self._steps(), num_preemptions)

    def _steps(self) -> list[TimedStep]:
        """The executor's steps; what else a turn of the loop took is the host's time."""
        steps = self._executor.steps
        if self._setup.async_scheduling:  # turns and steps overlap
            return steps
        return [
            TimedStep(
                shape=step.shape, seconds=step.seconds, host_s=max(0.0, loop_s - step.seconds)
            )
            for step, loop_s in zip(steps, self._loop_s, strict=True)
        ]

    def _now(self) -> float:
        return self._machine.clock.now() - self._start_s

    def _send_due(self) -> None:
        while self._num_sent < len(self._requests):
            client = self._clients[self._num_sent]
            if client.request.arrival_s > self._now():
                return
            try:
                self._core.add(self._requests[self._num_sent])
            except OverloadedError as error:
                client.refusal = str(error)
            except RequestError as error:
                raise ConfigError(f"request {self._num_sent} of the trace: {error}") from error
            self._num_sent += 1

    def _step(self, start_s: float) -> None:
        events = self._core.step()
        now_s = self._now()
        for event in events:
            self._read(event, now_s)
        moment = self._look()
        self._loop_s.append(self._now() - start_s)
        if events or moment.num_running:
            self._num_idle_looks = 0
            return
        self._num_idle_looks += 1
        if self._num_idle_looks > MAX_IDLE_LOOKS:
            raise IntegrityError(f"{moment.num_waiting} requests wait, and none of them can run")
        self._wait_for_next(IDLE_S)

    def _look(self) -> Moment:
        stats = self._core.stats()
        num_used_blocks = stats.num_blocks - stats.num_free_blocks
        moment = Moment(self._now(), stats.num_running, stats.num_waiting, num_used_blocks)
        self._moments.append(moment)
        return moment

    def _read(self, event: RequestEvent, now_s: float) -> None:
        client = self._clients[int(event.request_id)]
        if event.error is not None and event.error_code is FailureCode.DEADLINE_EXCEEDED:
            client.refusal = event.error
        elif event.error is not None:
            raise OctavoError(f"request {event.request_id} of the trace failed: {event.error}")
        client.num_cached_tokens += event.num_cached_tokens
        client.token_times.extend([now_s] * len(event.token_ids))

    def _wait_for_next(self, at_most_s: float) -> None:
        """Let time pass until a request comes, or for so long."""
        if self._num_sent < len(self._clients):
            next_s = self._clients[self._num_sent].request.arrival_s
            at_most_s = min(at_most_s, max(TICK_S, next_s - self._now()))
        self._machine.wait(at_most_s)


def _request(request: TraceRequest, index: int, block_size: int, vocab_size: int) -> Request:
    return Request(
        request_id=str(index),
        prompt_token_ids=prompt_token_ids(
            request, index, block_size=block_size, vocab_size=vocab_size
        ),
        sampling=SamplingParams(
            temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True
        ),
        seed=0,
        options=RequestOptions(
            tenant=request.tenant, priority=request.priority, deadline_ms=request.deadline_ms
        ),
    )
