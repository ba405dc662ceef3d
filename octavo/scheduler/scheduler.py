"""Who runs in a step and how much. Pure Python: no torch, no text; time is an argument.

There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens` and
`num_tokens`; every step gives sequences tokens so that the first catches up with the second.
Chunked prefill, prefix hits and recomputation after preemption are corollaries.

A plan may be made before the result of the last one is read (the asynchronous loop): tokens in
flight count as computed, and a sampled id that is still on its way counts as known, for the runner
has it. What turns out to be over at commit may have run one token too many; that token is dropped,
and its blocks stay held until the last step that can write them is committed.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from octavo.core import (
    Clock,
    EngineStats,
    FinishReason,
    Request,
    RequestEvent,
    SampledToken,
    Sequence,
    SequenceStatus,
    StepPlan,
    StepResult,
    SystemClock,
    resolve_max_tokens,
)
from octavo.errors import IntegrityError, RequestError
from octavo.kvcache import Allocator
from octavo.scheduler.admission import PrefillSpeed, QueueBounds, check_capacity
from octavo.scheduler.batching import Batching, Chunked
from octavo.scheduler.constraints import Constraint
from octavo.scheduler.decisions import DecisionLog
from octavo.scheduler.queues import FirstComeFirstServed, QueuePolicy
from octavo.scheduler.step import StepBuilder


@dataclass(slots=True)
class _InFlight:
    """A plan whose result has not been read."""

    plan: StepPlan
    # The sequences of its shares, with how often each had been preempted: a result that comes for
    # an earlier life of a sequence must not be booked to a later one.
    shares: list[tuple[Sequence, int]]
    start_s: float
    to_free: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Queues, plans and commits. Sole writer of every `Sequence` outside a step's planning."""

    def __init__(
        self,
        allocator: Allocator,
        constraints: SequenceOf[Constraint],
        *,
        max_model_len: int,
        queue: QueuePolicy | None = None,
        batching: Batching | None = None,
        bounds: QueueBounds | None = None,
        clock: Clock | None = None,
    ):
        self.allocator = allocator
        self.max_model_len = max_model_len
        self._clock = clock or SystemClock()
        self.decisions = DecisionLog(self._clock)
        self._constraints = tuple(constraints)
        # An empty queue is false, so `or` would not do.
        self._waiting = FirstComeFirstServed() if queue is None else queue
        self._batching = batching or Chunked()
        self._bounds = bounds or QueueBounds(PrefillSpeed())
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._dropped: list[str] = []  # the runner has not been told yet
        self._num_queued_tokens = 0
        self._counts = {"steps": 0, "preemptions": 0, "prompt": 0, "output": 0}
        self._prefix = {"queries": 0, "hits": 0}

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run: id in use, too long for the context or for the pool.
            OverloadedError: the queue is full, or the request could not be answered in time.
        """
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = resolve_max_tokens(
            num_prompt_tokens, request.sampling.max_tokens, self.max_model_len
        )
        # The last token generated is never computed, so it needs no slot.
        check_capacity(self.allocator, num_prompt_tokens + max_tokens - 1)
        sequence = Sequence(request, max_tokens, arrival_s=self._clock.now())
        self._bounds.check(
            sequence,
            num_queued=len(self._waiting),
            num_queued_tokens=self._num_queued_tokens,
        )
        self._sequences[sequence.id] = sequence
        self._waiting.add(sequence)
        self._num_queued_tokens += num_prompt_tokens
        self.decisions.arrives(sequence.id, num_prompt_tokens)

    def abort(self, request_ids: Iterable[str]) -> list[RequestEvent]:
        """End these requests now; unknown ids are ignored, for they may just have finished."""
        return self._end_all(request_ids, FinishReason.ABORT, None)

    def fail(self, request_ids: Iterable[str], error: str) -> list[RequestEvent]:
        """End these requests because of `error`, a sentence that clients may see."""
        return self._end_all(request_ids, FinishReason.ERROR, error)

    @property
    def has_work(self) -> bool:
        """True while a request is neither finished nor aborted."""
        return bool(self._sequences)

    # One step: plan, and after the runner is done, commit.

    def schedule(self) -> StepPlan:
        """Plan the next step. Empty where nothing can run."""
        step = StepBuilder(
            self._running,
            self._waiting,
            allocator=self.allocator,
            constraints=self._constraints,
            log=self.decisions,
        )
        self._batching.fill(step)
        for sequence in step.preempted:
            self._dropped.append(sequence.id)
            self._num_queued_tokens += sequence.num_prompt_tokens
        for new in step.new:
            self._note_admitted(self._sequences[new.sequence_id])
        dropped, self._dropped = tuple(self._dropped), []
        self._counts["steps"] += 1
        self._counts["preemptions"] += len(step.preempted)
        plan = StepPlan(self._counts["steps"], tuple(step.new), tuple(step.scheduled), dropped)
        sequences = [self._sequences[share.sequence_id] for share in plan.scheduled]
        shares = [(sequence, sequence.num_preemptions) for sequence in sequences]
        self._in_flight.append(_InFlight(plan, shares, self._clock.now()))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestEvent]:
        """Book what the runner did; return the news. Plans are committed in order."""
        sampled = {token.sequence_id: token for token in result.sampled}
        _check_result(plan, result, sampled)
        flight = self._land(plan)
        num_prompt_tokens = 0
        events = []
        for share, (sequence, life) in zip(plan.scheduled, flight.shares, strict=True):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.num_preemptions == life:
                num_prompt_tokens += sequence.commit(share.num_tokens)
                if not _failed(sampled.get(share.sequence_id)):
                    self.allocator.computed(sequence)
            if share.samples:
                events.append(self._commit_token(sequence, sampled[share.sequence_id]))
        self._counts["prompt"] += num_prompt_tokens
        if num_prompt_tokens:
            self._bounds.speed.note(num_prompt_tokens, self._clock.now() - flight.start_s)
        return events

    def discard(self, plan: StepPlan) -> None:
        """There will be no result for this plan; whoever ran in it must be ended by `fail`."""
        self._land(plan)
        # The runner may not have read it: it must hear again whom to forget.
        self._dropped = [*plan.dropped, *self._dropped]

    def _land(self, plan: StepPlan) -> _InFlight:
        """The oldest plan is over: free what waited for it."""
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise IntegrityError(f"step {plan.step} is not the oldest one in flight")
        flight = self._in_flight.popleft()
        for sequence in flight.to_free:
            self.allocator.free(sequence)
        return flight

    def _note_admitted(self, sequence: Sequence) -> None:
        self._num_queued_tokens -= sequence.num_prompt_tokens
        if sequence.num_preemptions == 0:
            self._prefix["queries"] += sequence.num_prompt_tokens
            self._prefix["hits"] += sequence.num_cached_tokens

    def _commit_token(self, sequence: Sequence, sampled: SampledToken) -> RequestEvent:
        if sampled.error is not None:
            return self._finish(sequence, FinishReason.ERROR, sampled.error)
        self._counts["output"] += 1
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            self._finish(sequence, reason)
        is_first = sequence.num_output_tokens == 1
        return RequestEvent(
            sequence.id,
            (sampled.token_id,),
            None if sampled.logprobs is None else (sampled.logprobs,),
            reason,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
        )

    def _end_all(
        self, request_ids: Iterable[str], reason: FinishReason, error: str | None
    ) -> list[RequestEvent]:
        alive = [i for i in dict.fromkeys(request_ids) if i in self._sequences]
        return [self._finish(self._sequences[i], reason, error) for i in alive]

    def _finish(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None
    ) -> RequestEvent:
        """The one way out: frees everything and makes the terminal event."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._dropped.append(sequence.id)  # the runner knows the running ones, and no others
        else:
            self._waiting.remove(sequence)
            self._num_queued_tokens -= sequence.num_prompt_tokens
        if self._in_flight and sequence.block_ids:
            self._in_flight[-1].to_free.append(sequence)
        else:
            self.allocator.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.id]
        self.decisions.ends(sequence.id, reason.value if error is None else error)
        return RequestEvent(sequence.id, finish_reason=reason, error=error)

    # Reports.

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=self.allocator.num_free_blocks,
            num_blocks=self.allocator.num_blocks,
            num_preemptions=self._counts["preemptions"],
            num_steps=self._counts["steps"],
            num_prompt_tokens=self._counts["prompt"],
            num_generation_tokens=self._counts["output"],
            num_prefix_queries=self._prefix["queries"],
            num_prefix_hits=self._prefix["hits"],
            waiting_by_reason=self.decisions.waiting_by_reason(),
        )

    def check_integrity(self) -> None:
        """Recount queues and blocks from scratch; raise `IntegrityError` on any difference."""
        waiting = list(self._waiting)
        if sorted(s.id for s in waiting + self._running) != sorted(self._sequences):
            raise IntegrityError("the queues do not hold exactly the live sequences")
        for sequence in waiting:
            if sequence.status is not SequenceStatus.WAITING or sequence.block_ids:
                raise IntegrityError(f"{sequence.id} waits but is not in a waiting state")
        for sequence in self._running:
            if sequence.status is not SequenceStatus.RUNNING:
                raise IntegrityError(f"{sequence.id} runs but is not in a running state")
            if sequence.num_computed_tokens > len(sequence.block_ids) * self.allocator.block_size:
                raise IntegrityError(f"{sequence.id} has computed more tokens than it has slots")
        queued_tokens = sum(s.num_prompt_tokens for s in waiting)
        if queued_tokens != self._num_queued_tokens:
            raise IntegrityError("the count of queued prompt tokens is wrong")
        held = [s for flight in self._in_flight for s in flight.to_free]
        self.allocator.check_integrity([*self._sequences.values(), *held])


def _check_result(plan: StepPlan, result: StepResult, sampled: dict[str, SampledToken]) -> None:
    """Refuse a result that does not answer the plan, before anything of it is booked."""
    if result.step != plan.step:
        raise IntegrityError(f"the result of step {result.step} came for step {plan.step}")
    missing = [s.sequence_id for s in plan.scheduled if s.samples and s.sequence_id not in sampled]
    if missing:
        raise IntegrityError(f"step {plan.step} brought no token for {missing[:4]}")


def _failed(token: SampledToken | None) -> bool:
    """Whether a sequence failed in this step: the KV that it wrote must not be found by others."""
    return token is not None and token.error is not None
