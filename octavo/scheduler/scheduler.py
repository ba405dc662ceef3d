"""Who runs in a step and how much. Pure Python: no torch, no wall-clock time, no text.

There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens` and
`num_tokens`; every step gives sequences tokens so that the first catches up with the second.
Chunked prefill, prefix hits and recomputation after preemption are corollaries.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from octavo.core import (
    EngineStats,
    FinishReason,
    NewSequence,
    Request,
    RequestEvent,
    SampledToken,
    ScheduledTokens,
    Sequence,
    SequenceStatus,
    StepPlan,
    StepResult,
    resolve_max_tokens,
)
from octavo.errors import CapacityError, IntegrityError, RequestError
from octavo.kvcache import Allocator
from octavo.scheduler.constraints import Constraint


class Scheduler:
    """Queues, the scheduling rule and the commit. Sole writer of every `Sequence`.

    Running sequences go first, oldest first, then waiting ones, first come first served. When the
    KV pool runs dry, the youngest running sequence gives all its blocks back and is computed again
    later ("preemption by recompute").
    """

    def __init__(
        self, allocator: Allocator, constraints: SequenceOf[Constraint], *, max_model_len: int
    ):
        self.allocator = allocator
        self.max_model_len = max_model_len
        self._constraints = tuple(constraints)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._dropped: list[str] = []  # the runner has not been told yet
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run: id in use, too long for the context or for the pool.
        """
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = resolve_max_tokens(
            num_prompt_tokens, request.sampling.max_tokens, self.max_model_len
        )
        # The last token generated is never computed, so it needs no slot.
        self._check_capacity(num_prompt_tokens + max_tokens - 1)
        sequence = Sequence(request, max_tokens)
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

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
        for constraint in self._constraints:
            constraint.begin_step()
        new: list[NewSequence] = []
        scheduled: list[ScheduledTokens] = []
        preempted = self._serve_running(scheduled)
        if not preempted:  # what was pushed out a moment ago must not come straight back
            self._admit_waiting(new, scheduled)
        dropped, self._dropped = tuple(self._dropped), []
        self._num_steps += 1
        return StepPlan(self._num_steps, tuple(new), tuple(scheduled), dropped)

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestEvent]:
        """Book what the runner did; return the news."""
        if result.step != plan.step:
            raise IntegrityError(f"the result of step {result.step} came for step {plan.step}")
        for share in plan.scheduled:
            sequence = self._sequences.get(share.sequence_id)
            if sequence is not None:
                before = sequence.num_computed_tokens
                sequence.num_computed_tokens = before + share.num_tokens
                prompt_left = max(0, sequence.num_prompt_tokens - before)
                self._num_prompt_tokens += min(prompt_left, share.num_tokens)
                self.allocator.computed(sequence)
        return [
            self._commit_token(sequence, sampled)
            for sampled in result.sampled
            if (sequence := self._sequences.get(sampled.sequence_id)) is not None
        ]

    def _serve_running(self, scheduled: list[ScheduledTokens]) -> bool:
        """Give running sequences their tokens; return whether one had to be pushed out."""
        preempted = False
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            num_tokens, bound_by = self._allowance(sequence)
            if num_tokens > 0:
                scheduled.append(self._grant(sequence, num_tokens))
            elif bound_by is not None and bound_by.preempts:
                self._preempt(self._running[-1])
                preempted = True
                continue  # ask again, unless it was itself the youngest
            index += 1
        return preempted

    def _admit_waiting(self, new: list[NewSequence], scheduled: list[ScheduledTokens]) -> None:
        """Admit waiting sequences in order until one does not fit."""
        while self._waiting:
            sequence = self._waiting[0]
            sequence.num_computed_tokens = self.allocator.start(sequence)
            num_tokens, _ = self._allowance(sequence)
            if num_tokens == 0:
                self.allocator.free(sequence)
                sequence.num_computed_tokens = 0
                return
            self._waiting.popleft()
            self._note_prefix(sequence)
            share = self._grant(sequence, num_tokens)
            sequence.status = SequenceStatus.RUNNING
            self._running.append(sequence)
            new.append(_introduce(sequence))
            scheduled.append(
                ScheduledTokens(share.sequence_id, share.num_tokens, (), share.samples)
            )

    def _note_prefix(self, sequence: Sequence) -> None:
        """Count what the prefix cache was asked for and gave, once for each request."""
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_prefix_queries += sequence.num_prompt_tokens
            self._num_prefix_hits += sequence.num_cached_tokens

    def _allowance(self, sequence: Sequence) -> tuple[int, Constraint | None]:
        """How many tokens all constraints allow, and which one said the least."""
        num_tokens = sequence.num_uncomputed_tokens
        bound_by = None
        for constraint in self._constraints:
            allowed = constraint.allow(sequence, num_tokens)
            if allowed < num_tokens:
                num_tokens, bound_by = allowed, constraint
                if allowed == 0:
                    break
        return num_tokens, bound_by

    def _grant(self, sequence: Sequence, num_tokens: int) -> ScheduledTokens:
        for constraint in self._constraints:
            constraint.take(sequence, num_tokens)
        added = self.allocator.extend(sequence, sequence.num_tokens)
        samples = num_tokens == sequence.num_uncomputed_tokens
        return ScheduledTokens(sequence.id, num_tokens, tuple(added), samples)

    def _preempt(self, sequence: Sequence) -> None:
        """Push a running sequence out; it goes first when there is room again."""
        self._running.remove(sequence)
        self.allocator.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._num_preemptions += 1
        self._dropped.append(sequence.id)
        self._waiting.appendleft(sequence)

    def _commit_token(self, sequence: Sequence, sampled: SampledToken) -> RequestEvent:
        if sampled.error is not None:
            return self._finish(sequence, FinishReason.ERROR, sampled.error)
        self._num_generation_tokens += 1
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            self._finish(sequence, reason)
        logprobs = None if sampled.logprobs is None else (sampled.logprobs,)
        is_first = sequence.num_output_tokens == 1
        return RequestEvent(
            sequence.id,
            (sampled.token_id,),
            logprobs,
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
        self.allocator.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.id]
        return RequestEvent(sequence.id, finish_reason=reason, error=error)

    def _check_capacity(self, num_tokens: int) -> None:
        block_size, num_blocks = self.allocator.block_size, self.allocator.num_blocks
        needed = -(-num_tokens // block_size)
        if needed > num_blocks:
            raise CapacityError(
                f"the request needs {needed} KV blocks of {block_size} tokens, but the whole pool "
                f"has {num_blocks}; ask for fewer tokens or give the pool more memory",
                param="max_tokens",
            )

    # Reports.

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=self.allocator.num_free_blocks,
            num_blocks=self.allocator.num_blocks,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
        )

    def check_integrity(self) -> None:
        """Recount queues and blocks from scratch; raise `IntegrityError` on any difference."""
        queued = [s.id for s in self._waiting] + [s.id for s in self._running]
        if sorted(queued) != sorted(self._sequences):
            raise IntegrityError("the queues do not hold exactly the live sequences")
        for sequence in self._waiting:
            if sequence.status is not SequenceStatus.WAITING or sequence.block_ids:
                raise IntegrityError(f"{sequence.id} waits but is not in a waiting state")
        for sequence in self._running:
            if sequence.status is not SequenceStatus.RUNNING:
                raise IntegrityError(f"{sequence.id} runs but is not in a running state")
            if sequence.num_computed_tokens > len(sequence.block_ids) * self.allocator.block_size:
                raise IntegrityError(f"{sequence.id} has computed more tokens than it has slots")
        self.allocator.check_integrity(self._sequences.values())


def _introduce(sequence: Sequence) -> NewSequence:
    """A sequence in full, as the runner needs it at first sight. Blocks were just given to it."""
    request = sequence.request
    return NewSequence(
        sequence_id=sequence.id,
        token_ids=tuple(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=sequence.num_computed_tokens,
        block_ids=tuple(sequence.block_ids),
        sampling=request.sampling,
        seed=request.seed,
        stop_ids=sequence.stop_ids,
    )
