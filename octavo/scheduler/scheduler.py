"""Who runs in a step and how much. Pure Python: no torch, no text; time is an argument.

There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens` and
`num_tokens`; every step gives sequences tokens so that the first catches up with the second.
Chunked prefill, prefix hits and recomputation after preemption are corollaries.

A plan may be made before the result of the last one is read (the asynchronous loop): tokens in
flight count as computed, and a sampled id that is still on its way counts as known, for the runner
has it. What turns out to be over at commit may have run one token too many; that token is dropped,
and its blocks stay held until the last step that can write them is committed.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from octavo.core import (
    FINISHED,
    RUNNING,
    WAITING,
    Clock,
    EngineStats,
    FailureCode,
    FinishReason,
    Fork,
    Request,
    RequestEvent,
    RequestStatus,
    SampledTokens,
    Sequence,
    StepPlan,
    StepResult,
    SystemClock,
    Tier,
    resolve_max_tokens,
)
from octavo.errors import IntegrityError, RequestError
from octavo.kvcache import Allocator
from octavo.scheduler.adapters import adapter_of, adapters_of
from octavo.scheduler.admission import PrefillSpeed, QueueBounds, check_capacity
from octavo.scheduler.batching import Batching, Chunked
from octavo.scheduler.constraints import Constraint
from octavo.scheduler.deadlines import Deadlines
from octavo.scheduler.decisions import DecisionLog
from octavo.scheduler.failed_transfers import spoilt_places
from octavo.scheduler.images import cache_of
from octavo.scheduler.preemption import Preemption
from octavo.scheduler.queues import FirstComeFirstServed, QueuePolicy
from octavo.scheduler.readings import take_readings
from octavo.scheduler.results import check_result, has_failed, with_first_token
from octavo.scheduler.siblings import BeamGroup, Siblings, Succession
from octavo.scheduler.step import StepBuilder
from octavo.scheduler.waiting import WaitingRoom

_TOO_LATE = "the first token was due while the request still waited; nothing of it was computed"


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
        preemption: Preemption | None = None,
        clock: Clock | None = None,
    ):
        self.allocator = allocator
        self.max_model_len = max_model_len
        self._clock = clock or SystemClock()
        self.decisions = DecisionLog(self._clock)
        self._constraints = tuple(constraints)
        self.images = cache_of(self._constraints)
        # An empty queue is false, so `or` would not do.
        self._waiting = WaitingRoom(FirstComeFirstServed() if queue is None else queue)
        self._batching = batching or Chunked()
        self._bounds = bounds or QueueBounds(PrefillSpeed())
        self._preemption = preemption or Preemption(prefills=self._bounds.speed)
        self._deadlines = Deadlines()
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._siblings: dict[str, Siblings] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._arrivals = itertools.count()
        self._dropped: list[str] = []  # the runner has not been told yet
        self._counts = {"steps": 0, "preemptions": 0, "prompt": 0, "output": 0}
        self._prefix = {"queries": 0, "hits": 0}
        self._num_transfers: Counter[str] = Counter()

    # Requests come and go.

    def add(self, *requests: Request) -> None:
        """Queue a request, or all the answers to one prompt: the others start from the first's KV.

        Raises:
            RequestError: it could never run: id in use, too long for the context or for the pool.
            OverloadedError: the queue is full, or the request could not be answered in time.
        """
        sequences = [self._new_sequence(request) for request in requests]
        first = sequences[0]
        for sequence in sequences[1:]:
            sequence.pictures = first.pictures
        self._bounds.check(
            first,
            num_queued=len(self._waiting),
            num_queued_tokens=self._waiting.num_queued_tokens,
            num_new=len(sequences),
            tokens_ahead=self._waiting.policy.tokens_ahead,
        )
        for sequence in sequences:
            self._sequences[sequence.id] = sequence
            self.decisions.arrives(sequence.id)
            self._deadlines.add(sequence)
        self._waiting.add(first)
        if len(sequences) > 1 or first.is_beam:
            group = BeamGroup(sequences) if first.is_beam else Siblings(sequences)
            for sequence in sequences:
                self._siblings[sequence.id] = group
            for sequence in sequences[1:]:
                self._waiting.hold(sequence)
                self.decisions.waits(sequence.id, "prompt", lambda: f"{first.id} computes it")

    def _new_sequence(self, request: Request) -> Sequence:
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = resolve_max_tokens(
            num_prompt_tokens, request.sampling.max_tokens, self.max_model_len
        )
        sequence = Sequence(
            request, max_tokens, arrival_s=self._clock.now(), arrival=next(self._arrivals)
        )
        check_capacity(self.allocator, sequence.max_num_computed_tokens)
        self.images.check(sequence.images)
        return sequence

    def abort(self, request_ids: Iterable[str]) -> list[RequestEvent]:
        """End these requests now; unknown ids are ignored, for they may just have finished."""
        return self.end(request_ids, FinishReason.ABORT)

    def expire(self) -> list[RequestEvent]:
        """End those who have not begun though their first token was due; needs no free place."""
        overdue = self._deadlines.passed(self._clock.now())
        code = FailureCode.DEADLINE_EXCEEDED
        return self.end(overdue, FinishReason.ERROR, _TOO_LATE, code) if overdue else []

    def end(
        self,
        request_ids: Iterable[str],
        reason: FinishReason,
        error: str | None = None,
        code: FailureCode = FailureCode.GENERATION_FAILED,
    ) -> list[RequestEvent]:
        """End these requests now, and whoever cannot go on without them; unknown ids are ignored.

        error, code: with the reason `error`; a sentence that clients may see, and what kind it is.
        """
        alive = [self._sequences[i] for i in dict.fromkeys(request_ids) if i in self._sequences]
        groups = [
            self._siblings[s.id].ended_with(s) if s.id in self._siblings else [s] for s in alive
        ]
        ending = dict.fromkeys(itertools.chain.from_iterable(groups))
        return [
            self._finish(sequence, reason, error, code)
            for sequence in ending
            if sequence.status is not FINISHED
        ]

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
            preemption=self._preemption,
            log=self.decisions,
        )
        self._batching.fill(step)
        nothing_runs = not (step.scheduled or any(f.plan.scheduled for f in self._in_flight))
        if self._running and nothing_runs:
            step.make_room()
        self._waiting.release(step.aside)
        now_s = self._clock.now()
        for sequence in step.admitted:
            sequence.first_scheduled_s = min(sequence.first_scheduled_s, now_s)
            if not sequence.goes_first:
                self._prefix["queries"] += sequence.num_prompt_tokens
                self._prefix["hits"] += sequence.num_cached_tokens
            sequence.fork = None  # it has what it shares
        self._counts["preemptions"] += len(step.preempted)
        self._dropped += [sequence.id for sequence in step.preempted]
        dropped, self._dropped = tuple(self._dropped), []
        self._counts["steps"] += 1
        plan = StepPlan(
            self._counts["steps"],
            tuple(step.new),
            tuple(step.scheduled),
            dropped,
            self.allocator.take_transfers(),
            *self.images.take_changes(),
        )
        sequences = [self._sequences[share.sequence_id] for share in plan.scheduled]
        shares = [(sequence, sequence.num_preemptions) for sequence in sequences]
        self._in_flight.append(_InFlight(plan, shares, now_s))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestEvent]:
        """Book what the runner did; return the news. Plans are committed in order."""
        sampled = {tokens.sequence_id: tokens for tokens in result.sampled}
        check_result(plan, result, sampled)
        flight = self._land(plan)
        self._commit_transfers(plan, result)
        num_prompt_tokens = 0
        events = []
        for sequence, error in take_readings(result.readings, flight.shares, plan.step):
            self.allocator.discredit(sequence)
            code = FailureCode.NUMERICAL_ERROR
            events += self.end([sequence.id], FinishReason.ERROR, error, code)
        for share, (sequence, life) in zip(plan.scheduled, flight.shares, strict=True):
            if sequence.status is FINISHED or plan.step < sequence.valid_from_step:
                continue
            if sequence.num_preemptions == life:
                num_prompt_tokens += sequence.commit(share)
                if not has_failed(sampled.get(share.sequence_id)):
                    self.allocator.computed(sequence)
                    if self._siblings and sequence.id in self._siblings:
                        self._waiting.release(self._siblings[sequence.id].released())
            if share.samples:
                num_drafts = len(share.draft_ids)
                events += self._commit_tokens(sequence, sampled[share.sequence_id], num_drafts)
            elif sequence.is_over_without_draws:
                events.append(self._finish(sequence, sequence.end_without_draws))
        self._counts["prompt"] += num_prompt_tokens
        if num_prompt_tokens:
            self._bounds.speed.note(num_prompt_tokens, self._clock.now() - flight.start_s)
        return events

    def discard(self, *plans: StepPlan, out_of_memory: bool = False) -> list[str]:
        """There will be no results for these plans, oldest first, and the runner is done with them.

        Whoever ran in them has lost its KV, and waits to have it computed again. Returns their ids,
        first the one that gives way first.

        out_of_memory: what ran was too much at once; the next steps are smaller.
        """
        ran: dict[Sequence, None] = {}
        for plan in plans:
            flight = self._land(plan)
            self.allocator.lose({(t.target_tier, t.target) for t in plan.transfers})
            self.images.lose([*plan.forgotten_images, *(p.key for p in plan.pictures)])
            # The runner may not have read it: it must hear again whom to forget.
            self._dropped = [*plan.dropped, *self._dropped]
            ran |= dict.fromkeys(s for s, _ in flight.shares if s.status is not FINISHED)
            for constraint in self._constraints if out_of_memory else ():
                constraint.ran_out(plan.num_tokens)
        running = [sequence for sequence in self._running if sequence in ran]
        first = [self._waiting.policy.victim(running)] if running else []
        for sequence in ran:
            self._push_out(sequence, "failure", "the step that it was in failed")
        return [sequence.id for sequence in dict.fromkeys([*first, *ran])]

    def _land(self, plan: StepPlan) -> _InFlight:
        """The oldest plan is over: free what waited for it."""
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise IntegrityError(f"step {plan.step} is not the oldest one in flight")
        flight = self._in_flight.popleft()
        for sequence in flight.to_free:
            self.allocator.free(sequence)
        return flight

    def _commit_transfers(self, plan: StepPlan, result: StepResult) -> None:
        """Note what copying cost; whoever was given a block whose content is lost starts anew."""
        num_swapped = sum(
            {transfer.source_tier, transfer.target_tier} == {Tier.DEVICE, Tier.HOST}
            for transfer in plan.transfers
        )
        self._preemption.transfers.note(num_swapped, result.transfer_s)
        for transfer in plan.transfers:
            name = f"{transfer.source_tier.name}_to_{transfer.target_tier.name}".lower()
            self._num_transfers[name] += 1
        if not result.failed_transfers:
            return
        later = [flight.plan for flight in self._in_flight]
        spoilt = spoilt_places(result.failed_transfers, [plan, *later])
        self.allocator.lose(spoilt)
        bad = {block_id for tier, block_id in spoilt if tier is Tier.DEVICE}
        tables: dict[str, SequenceOf[int]] = {s.id: s.block_ids for s in self._running}
        tables |= {new.sequence_id: new.block_ids for p in (plan, *later) for new in p.new}
        for sequence_id, table in tables.items():
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and not bad.isdisjoint(table):
                sequence.valid_from_step = self._counts["steps"] + 1
                self._push_out(sequence, "transfer", "its KV was lost on the way")

    def _push_out(self, sequence: Sequence, reason: str, outcome: str) -> None:
        """Outside of a step's planning: a sequence loses its KV and waits for a place.

        It awaits no result any more, for there will be none, or it will not count.
        """
        self.allocator.free(sequence)
        sequence.num_pending_tokens = 0
        sequence.awaits_result = False
        sequence.lose_memory()
        if sequence.status is RUNNING:
            self._running.remove(sequence)
            sequence.status = WAITING
            sequence.num_preemptions += 1
            self.decisions.preempted(sequence.id, reason, outcome)
            self._counts["preemptions"] += 1
            self._dropped.append(sequence.id)
            self._waiting.add(sequence)
        else:
            self._waiting.release([sequence])

    def _commit_tokens(
        self, sequence: Sequence, sampled: SampledTokens, num_drafts: int
    ) -> list[RequestEvent]:
        """Book what a sequence got; return the news, of siblings too where they depend on it."""
        if sampled.error is not None:
            self.allocator.discredit(sequence)
            return self.end([sequence.id], FinishReason.ERROR, sampled.error, sampled.error_code)
        if sequence.is_beam:
            return self._commit_beam(sequence, sampled)
        num_before = sequence.num_output_tokens
        reason = sequence.extend(sampled.token_ids, num_drafts)
        num_new = sequence.num_output_tokens - num_before
        self._counts["output"] += num_new
        if reason is not None:
            self._finish(sequence, reason)
        else:
            if sequence.status is WAITING:
                self._waiting.release([sequence])  # it was pushed out while it awaited this
            if sampled.draft_ids:
                sequence.guess(sampled.draft_ids)
        logprobs = None if sampled.logprobs is None else sampled.logprobs[:num_new]
        event = RequestEvent(sequence.id, sampled.token_ids[:num_new], logprobs, reason)
        return [event if num_before else with_first_token(event, sequence, self._clock.now())]

    def _commit_beam(self, sequence: Sequence, sampled: SampledTokens) -> list[RequestEvent]:
        """Note what a beam found; when all have reported, let each take the place of its parent."""
        group = self._siblings[sequence.id]
        if sampled.logprobs is None or not isinstance(group, BeamGroup):
            raise IntegrityError(f"{sequence.id} reports no candidates to its beam search")
        self._counts["output"] += 1
        if not group.report(sequence, sampled.logprobs[0].top):
            return []
        successions = group.advance()
        for succession in successions:
            self._succeed(succession)
        if successions:
            return []
        return [
            self._finish(member, found.finish_reason, token_ids=found.token_ids)
            for member, found in group.answers()
        ]

    def _succeed(self, succession: Succession) -> None:
        """A beam goes on from its parent's tokens and KV, or waits to have them computed."""
        beam, parent = succession.beam, succession.parent
        beam.token_ids = list(succession.token_ids)
        beam.awaits_result = False
        if beam.status is RUNNING:
            beam.is_known = False
            self._dropped.append(beam.id)
            if self.allocator.refork(beam, succession.block_ids):
                beam.num_computed_tokens = succession.num_computed_tokens
                beam.num_committed_tokens = succession.num_computed_tokens
            else:
                self._push_out(beam, "beams", "the beam that it goes on from has lost its KV")
        else:
            if beam is not parent:
                self.allocator.refork(beam, [])  # what it had is of another beam
                beam.fork = Fork(parent, len(beam.token_ids) - 1)
            self._waiting.release([beam])

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None = None,
        code: FailureCode = FailureCode.GENERATION_FAILED,
        *,
        token_ids: tuple[int, ...] = (),
    ) -> RequestEvent:
        """The one way out: frees everything and makes the terminal event."""
        if sequence.status is RUNNING:
            self._running.remove(sequence)
            self._dropped.append(sequence.id)  # the runner knows the running ones, and no others
        else:
            self._waiting.remove(sequence)
        if self._in_flight and sequence.block_ids:
            self._in_flight[-1].to_free.append(sequence)
        else:
            self.allocator.free(sequence)
        sequence.status = FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.id]
        self.decisions.ends(sequence.id, reason.value if error is None else error)
        if sequence.id in self._siblings:
            self._waiting.release(self._siblings.pop(sequence.id).released())
        event = RequestEvent(
            sequence.id, token_ids, finish_reason=reason, error=error, error_code=code
        )
        if token_ids or sequence.is_over_without_draws:
            return with_first_token(event, sequence, self._clock.now())
        return event

    # Reports.

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        adapters, max_loras = adapters_of(self._constraints, self._running, self._waiting)
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
            num_transfers=dict(self._num_transfers),
            waiting_by_reason=self.decisions.waiting_by_reason(),
            adapters=adapters,
            max_loras=max_loras,
        )

    def statuses(self) -> list[RequestStatus]:
        """All live requests, those that run first."""
        now_s = self._clock.now()
        return [
            RequestStatus(
                request_id=sequence.id,
                status="running" if sequence.status is RUNNING else "waiting",
                reason=self.decisions.reason_of(sequence.id),
                age_s=now_s - sequence.arrival_s,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_computed_tokens=sequence.num_computed_tokens,
                num_output_tokens=sequence.num_output_tokens,
                num_preemptions=sequence.num_preemptions,
                priority=sequence.request.options.priority,
                tenant=sequence.request.options.tenant,
            )
            for sequence in (*self._running, *self._waiting)
        ]

    def check_integrity(self) -> None:
        """Recount queues and blocks from scratch; raise `IntegrityError` on any difference."""
        if sorted(s.id for s in (*self._waiting, *self._running)) != sorted(self._sequences):
            raise IntegrityError("the queues do not hold exactly the live sequences")
        self._waiting.check_integrity()
        self.images.check_integrity()
        for sequence in self._running:
            if sequence.status is not RUNNING:
                raise IntegrityError(f"{sequence.id} runs but is not in a running state")
        held = [s for flight in self._in_flight for s in flight.to_free]
        self.allocator.check_integrity([*self._sequences.values(), *held])


def adapters_in_use(scheduler: Scheduler) -> set[str]:
    """Those of all live requests and of those in steps that are not over yet, by digest."""
    in_flight = (s for flight in scheduler._in_flight for s, _ in flight.shares)
    found = map(adapter_of, itertools.chain(scheduler._sequences.values(), in_flight))
    return {digest for digest in found if digest is not None}
