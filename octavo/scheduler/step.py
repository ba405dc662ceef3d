"""One step while it is planned: who gets how many tokens, and who gives way. Pure Python.

Holds the scheduling rule and applies the constraints; the order in which sequences are served is
`batching`'s, the order of the queue is the policy's.
"""

from collections.abc import Sequence as SequenceOf

from octavo.core import RUNNING, WAITING, NewSequence, ScheduledTokens, Sequence
from octavo.kvcache import Allocator
from octavo.scheduler.adapters import adapter_of
from octavo.scheduler.constraints import Constraint
from octavo.scheduler.decisions import DecisionLog
from octavo.scheduler.preemption import Preemption
from octavo.scheduler.waiting import WaitingRoom


class StepBuilder:
    """The plan of one step. Sole writer of running and waiting sequences while it is made."""

    def __init__(
        self,
        running: list[Sequence],
        waiting: WaitingRoom,
        *,
        allocator: Allocator,
        constraints: SequenceOf[Constraint],
        preemption: Preemption,
        log: DecisionLog,
    ):
        self.running = running
        self.waiting = waiting.policy
        self._room = waiting
        self.new: list[NewSequence] = []
        self.scheduled: list[ScheduledTokens] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.aside: list[Sequence] = []  # they let others pass, and wait again after this step
        self.stopped_by: str | None = None  # why admission ended, where somebody still waits
        self._allocator = allocator
        self._constraints = constraints
        self._of_running = [c for c in constraints if c.binds_running]
        self._preemption = preemption
        self._log = log
        self._served: set[Sequence] = set()
        for constraint in constraints:
            constraint.begin_step(running)

    def serve_running(self, *, prefills_only: bool = False) -> None:
        """Give running sequences their tokens, in order of admission.

        Where a limit is cured by pushing somebody out, the policy's victim goes, until the sequence
        fits or is itself the one to go.
        """
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence in self._served or (prefills_only and not sequence.is_prefilling):
                continue
            num_wanted = sequence.num_uncomputed_tokens
            num_tokens, bound_by = self._allowance(sequence, num_wanted)
            while num_tokens == 0 and bound_by is not None and bound_by.preempts:
                victim = self._victim()
                position = self.running.index(victim)
                self._preempt(victim, bound_by.name)
                index -= position < index
                if victim is sequence:
                    break
                num_tokens, bound_by = self._allowance(sequence, num_wanted)
            if num_tokens > 0:
                self._grant(sequence, num_tokens)
            if 0 <= num_tokens < num_wanted and sequence.status is RUNNING:
                self._log.held_back(sequence.id)

    def admit_urgent(self) -> None:
        """Admit waiting sequences that outrank a running one, pushing that one out if need be."""
        while (sequence := self.waiting.head()) is not None and self.running:
            if not self.waiting.outranks(sequence, self.waiting.victim(self.running)):
                return
            if not self._try_to_admit(sequence):
                return

    def admit_waiting(self) -> None:
        """Admit waiting sequences in the policy's order until one does not fit."""
        while (sequence := self.waiting.head()) is not None:
            # What was pushed out a moment ago must not come straight back.
            if sequence in self.preempted:
                return
            if not self._try_to_admit(sequence) and sequence not in self.aside[-1:]:
                return

    def make_room(self) -> None:
        """Push out those who run but have nothing to run until somebody can be admitted.

        Beams that wait for each other are such: without this they could wait forever.
        """
        while (sequence := self.waiting.head()) is not None and not self._try_to_admit(sequence):
            if sequence in self.aside[-1:]:
                continue
            if not self.running:
                return
            self._preempt(self._victim(), "idle")

    def _try_to_admit(self, sequence: Sequence) -> bool:
        sequence.num_computed_tokens = self._allocator.start(sequence)
        num_tokens, bound_by = self._allowance(sequence, sequence.num_uncomputed_tokens)
        while num_tokens == 0 and bound_by is not None and self._displace(sequence, bound_by):
            num_tokens, bound_by = self._allowance(sequence, sequence.num_uncomputed_tokens)
        if num_tokens > 0:
            self._admit(sequence, num_tokens)
            return True
        if bound_by is not None:
            limit = bound_by
            self.stopped_by = limit.name
            self._log.waits(sequence.id, limit.name, lambda: limit.explain(sequence))
        self._allocator.stop(sequence)
        sequence.num_computed_tokens = 0
        if bound_by is not None and bound_by.stands_aside:
            self._room.remove(sequence)
            self._room.hold(sequence)
            self.aside.append(sequence)
        return False

    def _admit(self, sequence: Sequence, num_tokens: int) -> None:
        num_cached_tokens = sequence.num_computed_tokens
        if not sequence.goes_first:  # what a sibling computed was not found in the cache
            sequence.num_cached_tokens = num_cached_tokens
        sequence.num_committed_tokens = num_cached_tokens
        self._grant(sequence, num_tokens)
        self._room.remove(sequence)
        sequence.status = RUNNING
        self.running.append(sequence)
        self.admitted.append(sequence)
        self._log.runs(sequence.id, num_cached_tokens, len(sequence.token_ids))

    def _limits_of(self, sequence: Sequence) -> SequenceOf[Constraint]:
        return self._of_running if sequence.status is RUNNING else self._constraints

    def _allowance(self, sequence: Sequence, num_tokens: int) -> tuple[int, Constraint | None]:
        """How many tokens all constraints allow, and which one said the least."""
        bound_by = None
        for constraint in self._limits_of(sequence):
            allowed = constraint.allow(sequence, num_tokens)
            if allowed < num_tokens:
                num_tokens, bound_by = allowed, constraint
                if allowed == 0:
                    break
        return num_tokens, bound_by

    def _grant(self, sequence: Sequence, num_tokens: int) -> None:
        for constraint in self._limits_of(sequence):
            constraint.take(sequence, num_tokens)
        num_computed_tokens = sequence.num_computed_tokens
        # Room for all that is known: half a prompt in the pool helps nobody. Drafts that are left
        # out need none.
        num_known = sequence.num_tokens - len(sequence.draft_ids)
        first = self._allocator.extend(sequence, max(num_known, num_computed_tokens + num_tokens))
        self.waiting.served(sequence, num_tokens)
        samples = sequence.run(num_tokens)
        changed: tuple[int, ...] = ()
        if sequence.is_known:
            changed = tuple(sequence.block_ids[first:])
        else:
            # The runner gets the whole block table with the introduction, so the share adds none.
            self.new.append(_introduce(sequence, num_computed_tokens))
            sequence.is_known, first = True, len(sequence.block_ids)
        share = ScheduledTokens(
            sequence.id, num_tokens, first, changed, samples, tuple(sequence.draft_ids)
        )
        self.scheduled.append(share)
        self._served.add(sequence)

    def _victim(self) -> Sequence:
        """Who gives way: among those not yet served in this step, the policy's choice."""
        return self.waiting.victim([s for s in self.running if s not in self._served])

    def _displace(self, sequence: Sequence, bound_by: Constraint) -> bool:
        """Push a running sequence out for a waiting one of higher rank, if there is such a one."""
        candidates = [s for s in self.running if s not in self._served]
        victim = self.waiting.victim(candidates) if candidates else None
        if victim is None or not self.waiting.outranks(sequence, victim):
            return False
        self._preempt(victim, bound_by.name)
        return True

    def _preempt(self, sequence: Sequence, reason: str) -> None:
        """Push a running sequence out, back to the queue unless it waits for a result."""
        self.running.remove(sequence)
        for constraint in self._constraints:
            constraint.release(sequence)
        outcome = self._preemption.give_up(sequence, self._allocator)
        sequence.lose_memory()
        sequence.num_preemptions += 1
        sequence.status = WAITING
        self.preempted.append(sequence)
        if sequence.awaits_result:
            self._room.hold(sequence)
        else:
            self._room.add(sequence)
        self._log.preempted(sequence.id, reason, outcome)


def _introduce(sequence: Sequence, num_computed_tokens: int) -> NewSequence:
    """A sequence in full, as the runner needs it at first sight. Blocks were just given to it."""
    request, awaits_scores = sequence.request, sequence.awaits_scores
    return NewSequence(
        sequence_id=sequence.id,
        token_ids=tuple(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=tuple(sequence.block_ids),
        sampling=request.sampling,
        seed=request.seed,
        stop_ids=sequence.stop_ids,
        num_logprobs=sequence.num_logprobs,
        banned=request.banned,
        num_prompt_logprobs=sequence.num_prompt_logprobs if awaits_scores else None,
        num_scored_tokens=len(sequence.scores),
        pooling=request.pooling,
        images=sequence.images,
        adapter=adapter_of(sequence),
    )
