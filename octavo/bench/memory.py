"""Where KV memory goes under each allocator: the comparison of PagedAttention's figure 2.

One workload goes through the real scheduler with each allocator in turn, with a pool far smaller
than the demand, and while requests wait every step counts the slots of the pool. Nothing is
computed: an executor that knows each request's true length says when it ends, so reservation and
internal fragmentation can be told apart as in the paper, which looked at them afterwards.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from octavo.config import option
from octavo.core import (
    Request,
    SampledTokens,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepPlan,
    StepResult,
)
from octavo.errors import ConfigError
from octavo.kvcache import MemoryUse, create_allocator, measure_memory
from octavo.scheduler import Blocks, Constraint, Scheduler, SequenceSlots, TokenBudget
from octavo.sim import VirtualClock
from octavo.sim.workload import RECIPES, TraceSize, Workload, make_workload

END_ID = 0  # the token that ends an answer
OTHER_ID = 1

# The paper gives no spread of lengths, but what follows from it: Orca (Max) reserves 13.3% of 15.7K
# slots (figure 2, table 1) for what its 7.00 requests (figure 13) will still write. A request that
# runs has E[n^2] / 2 E[n] tokens left on average, where outputs have a mean of 337.99 (figure 11),
# and for log-normal lengths E[n^2] / E[n]^2 = exp(spread^2).
SPREAD = math.sqrt(math.log(2 * 0.133 * 15_700 / 7.00 / 337.99))


@dataclass(frozen=True, slots=True)
class Published:
    """What the paper measured with OPT-13B on one A100 of 40 GB: figures 2 and 13.

    Figure 2 does not name its workload. It is ShareGPT: 7 requests of 2048 slots fill 15.7K to
    91.1%, and only its mean prompt gives them 20.4% of token states besides 13.3% of reservation.
    """

    system: str
    # Token states, reservation, internal fragmentation, others; None where no number is given.
    percent: tuple[float, float | None, float | None, float | None]
    num_running: dict[str, float]  # by workload


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to give memory, and what it is told of a request's end.

    bound: the `max_tokens` that a request asks for, given how many tokens it will generate; None
        for as many as the context allows.
    """

    name: str
    allocator: str
    bound: Callable[[int], int | None]
    published: Published


def power_of_two(num_tokens: int) -> int:
    """The smallest power of two that is not less: the paper's stand-in for clients' bounds."""
    return 1 << (num_tokens - 1).bit_length()


def unbounded(num_tokens: int) -> None:
    """Clients say nothing: up to the end of the context."""


def exact(num_tokens: int) -> int:
    """The true length, which nobody knows before the end."""
    return num_tokens


SCHEMES = (
    Scheme(
        "contiguous",
        "contiguous",
        unbounded,
        Published("Orca (Max)", (20.4, 13.3, 57.3, 8.9), {"sharegpt": 7.00, "alpaca": 7.00}),
    ),
    Scheme(
        "contiguous-buddy",
        "contiguous-buddy",
        power_of_two,
        Published("Orca (Pow2)", (26.8, 17.9, 13.6, 41.6), {"sharegpt": 9.81, "alpaca": 43.24}),
    ),
    Scheme(
        "oracle",
        "contiguous-buddy",
        exact,
        Published("Orca (Oracle)", (38.2, 25.2, None, 36.6), {"sharegpt": 13.62, "alpaca": 72.75}),
    ),
    Scheme(
        "paged",
        "paged",
        power_of_two,
        Published("vLLM", (96.3, None, None, None), {"sharegpt": 30.42, "alpaca": 132.44}),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetup:
    """What goes through which pool. The defaults are the paper's (figure 11, table 1)."""

    workload: str = option("sharegpt", "whose lengths the requests have", ("sharegpt", "alpaca"))
    num_requests: int = option(1000, "requests, all of which wait from the beginning")
    num_slots: int = option(15_700, "tokens whose KV the pool holds")
    max_model_len: int = option(2048, "longest prompt and output together, in tokens")
    block_size: int = option(16, "tokens in a KV block")
    seed: int = option(0, "the same seed draws the same requests")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("workload", "seed") and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} must be a positive integer")
        if self.num_slots < 2 * self.max_model_len:
            raise ConfigError(
                f"a pool of {self.num_slots} tokens does not hold two contexts of "
                f"{self.max_model_len}; raise num_slots or lower max_model_len"
            )


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """What one scheme did with the pool: means over the steps in which requests waited.

    used, reserved, external, free: shares of the pool, as `MemoryUse` defines them with the true
        lengths. What it calls internal is in two parts here:
    internal: beyond the request's true end, within what it asked for
    rounding: beyond what the request could ever use. The paper's Orca (Oracle) has no internal
        fragmentation though its buddy allocator rounds up, so there it counts as "others".
    """

    scheme: Scheme
    used: float
    reserved: float
    internal: float
    rounding: float
    external: float
    free: float
    num_running: float
    num_tokens_per_step: float

    @property
    def others(self) -> float:
        """What the paper has in one: external fragmentation and others."""
        return self.rounding + self.external + self.free


class Witness(Constraint):
    """A constraint that allows everything and remembers who asked: the public way to see a step."""

    name = "witness"

    def __init__(self) -> None:
        self._asked: dict[str, Sequence] = {}

    @property
    def running(self) -> list[Sequence]:
        """Who runs in the step that was planned last."""
        return [s for s in self._asked.values() if s.status is SequenceStatus.RUNNING]

    @property
    def refused(self) -> Sequence | None:
        """The one at the head of the queue that had to go on waiting, if it was asked for."""
        waiting = [s for s in self._asked.values() if s.status is SequenceStatus.WAITING]
        return waiting[-1] if waiting else None

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._asked = {}

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        self._asked[sequence.id] = sequence
        return num_tokens

    def explain(self, sequence: Sequence) -> str:
        return "everything is allowed"


class LengthExecutor:
    """Computes nothing; ends each request after as many tokens as it is known to have."""

    def __init__(self, num_output_tokens: dict[str, int]):
        self._num_left = dict(num_output_tokens)

    def execute(self, plan: StepPlan) -> StepResult:
        sampled = [self._sample(share.sequence_id) for share in plan.scheduled if share.samples]
        return StepResult(plan.step, tuple(sampled))

    def _sample(self, sequence_id: str) -> SampledTokens:
        self._num_left[sequence_id] -= 1
        token_id = OTHER_ID if self._num_left[sequence_id] else END_ID
        return SampledTokens(sequence_id, (token_id,))


def draw_workload(setup: MemorySetup) -> Workload:
    """The requests' lengths, with the spread that follows from the paper's figures."""
    size = TraceSize(
        num_requests=setup.num_requests,
        max_model_len=setup.max_model_len,
        spread=SPREAD,
        seed=setup.seed,
    )
    return make_workload(RECIPES[setup.workload], size)


def compare_memory(setup: MemorySetup, workload: Workload) -> list[MemoryRow]:
    """A row for each scheme, all of them over the same requests.

    Raises:
        ConfigError: the pool holds all requests at once, so nothing is scarce.
    """
    return [measure_scheme(scheme, setup, workload) for scheme in SCHEMES]


def measure_scheme(scheme: Scheme, setup: MemorySetup, workload: Workload) -> MemoryRow:
    """Serve the workload with one scheme until nobody waits any more.

    The first requests begin all at once, which no server sees, so counting starts when as many have
    ended as ran at first.
    """
    witness = Witness()
    scheduler = _scheduler(scheme, setup, witness)
    requests = _requests(scheme, setup, workload)
    for request in requests:
        scheduler.add(request)
    pairs = zip(requests, workload.requests, strict=True)
    lengths = {request.request_id: trace.num_output_tokens for request, trace in pairs}
    executor = LengthExecutor(lengths)

    def end(sequence: Sequence) -> int:
        return sequence.num_prompt_tokens + lengths[sequence.id] - 1

    tally = _Tally()
    num_alive, num_first = len(requests), 0
    while True:
        plan = scheduler.schedule()
        running = witness.running
        if len(running) == num_alive:
            break
        num_first = num_first or len(running)
        result = executor.execute(plan)
        if num_alive <= len(requests) - num_first:
            use = measure_memory(scheduler.allocator, running, end=end, wish=witness.refused)
            rounding = measure_memory(scheduler.allocator, running).num_internal_slots
            tally.note(use, rounding, num_running=len(running), num_sampled=len(result.sampled))
        events = scheduler.commit(plan, result)
        num_alive -= sum(event.finish_reason is not None for event in events)
    if not tally.uses:
        raise ConfigError(
            f"a pool of {setup.num_slots} tokens leaves too few of {setup.num_requests} requests "
            "waiting to measure anything; raise num_requests or lower num_slots"
        )
    return tally.row(scheme)


class _Tally:
    """Sums over steps. Sole writer: `measure_scheme`."""

    def __init__(self) -> None:
        self.uses: list[MemoryUse] = []
        self._num_rounded_slots = self._num_running = self._num_sampled = 0

    def note(
        self, use: MemoryUse, num_rounded_slots: int, *, num_running: int, num_sampled: int
    ) -> None:
        """One step: the pool by true lengths, what of it is rounding in any case, and who ran."""
        self.uses.append(use)
        self._num_rounded_slots += num_rounded_slots
        self._num_running += num_running
        self._num_sampled += num_sampled

    def row(self, scheme: Scheme) -> MemoryRow:
        """The means."""
        num_slots = sum(use.num_slots for use in self.uses)
        num_internal = sum(use.num_internal_slots for use in self.uses) - self._num_rounded_slots
        return MemoryRow(
            scheme,
            used=sum(use.num_used_slots for use in self.uses) / num_slots,
            reserved=sum(use.num_reserved_slots for use in self.uses) / num_slots,
            internal=num_internal / num_slots,
            rounding=self._num_rounded_slots / num_slots,
            external=sum(use.num_external_slots for use in self.uses) / num_slots,
            free=sum(use.num_free_slots for use in self.uses) / num_slots,
            num_running=self._num_running / len(self.uses),
            num_tokens_per_step=self._num_sampled / len(self.uses),
        )


def _scheduler(scheme: Scheme, setup: MemorySetup, witness: Witness) -> Scheduler:
    """A scheduler that memory alone limits: places for all, and tokens for all prompts at once."""
    allocator = create_allocator(
        scheme.allocator,
        setup.num_slots // setup.block_size,
        setup.block_size,
        max_model_len=setup.max_model_len,
    )
    constraints: list[Constraint] = [
        witness,
        TokenBudget(setup.num_slots),
        SequenceSlots(setup.num_requests),
        Blocks(allocator),
    ]
    return Scheduler(
        allocator, constraints, max_model_len=setup.max_model_len, clock=VirtualClock()
    )


def _requests(scheme: Scheme, setup: MemorySetup, workload: Workload) -> list[Request]:
    requests = []
    for index, trace in enumerate(workload.requests):
        room = setup.max_model_len - trace.num_prompt_tokens
        bound = scheme.bound(trace.num_output_tokens)
        max_tokens = room if bound is None else min(bound, room)
        request = Request(
            request_id=str(index),
            prompt_token_ids=[OTHER_ID] * trace.num_prompt_tokens,
            sampling=SamplingParams(max_tokens=max_tokens),
            seed=0,
            eos_token_ids=(END_ID,),
        )
        requests.append(request)
    return requests
