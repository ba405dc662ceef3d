"""The engine loop that serves, in virtual time: what arrives, what goes wrong, what clients see.

Owns the order of things: messages are taken between steps, as the engine process does, and after
every step the books are recounted. `SimulatedEngine` is assembled of `Parts`, so that a test can
put a broken one in. Knows no dice: everything random was decided by who made actions and faults.
"""

from collections import Counter
from collections.abc import Iterable

from octavo.core import FailureCode, Request, RequestEvent, SamplingParams, Tier
from octavo.errors import EngineDeadError, IntegrityError, OverloadedError, RequestError
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
from octavo.sim.faults import STEP_FAILURES, WRONG_REPLIES, Fault, Faults, FaultyExecutor, Injection
from octavo.sim.history import Client, History
from octavo.sim.parts import EngineSetup, Parts
from octavo.sim.trace import Trace, TracedStep

MAX_FAILED_STEPS = 2  # in a row; only after so many may an engine end
FAILURES = STEP_FAILURES | WRONG_REPLIES  # of a whole step, or what may be taken for one
MAX_STEPS_TO_GROW = 16  # from a token to any budget of ours, by doubling
NUM_WINDOW_STEPS = 10  # that a batch may wait for more members


class SimulatedEngine:
    """An engine core, the world around it, and the record of what clients saw.

    Anything that breaks a promise raises `IntegrityError` where it happens; `trace` then holds the
    steps before.
    """

    def __init__(
        self,
        setup: EngineSetup,
        *,
        faults: Faults | None = None,
        parts: Parts | None = None,
    ):
        parts = parts or Parts()
        self.setup = setup
        self.clock = VirtualClock()
        self.history = History(vocab_size=setup.vocab_size, block_size=setup.block_size)
        self.trace = Trace()
        self.num_steps = 0
        self.runner = parts.executor(setup)
        self.executor = FaultyExecutor(
            self.runner, self.clock, faults or Faults(), runs_ahead=setup.asynchronous
        )
        self.allocator = parts.allocator(setup)
        self.scheduler = parts.scheduler(self.allocator, setup, self.clock)
        self.core = parts.core(self.scheduler, self.executor, setup)
        self._is_draining = False
        self._num_preemptions = 0
        self._step_start_s = 0.0  # of the last step
        self._small_until_step = 0  # steps have all their tokens again, after one found no memory
        self.moves: Counter[tuple[Tier, Tier]] = Counter()  # blocks copied, by where from and to

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
        last_step = self._step_when_idle() + self.setup.asynchronous
        while self.core.has_work and not self.history.engine_died:
            if self.num_steps >= last_step:
                raise IntegrityError(f"{sorted(self.history.live)} are starved: no end in sight")
            self.step()
        if self.history.live:
            raise IntegrityError(f"the engine is idle, but {sorted(self.history.live)} wait")

    def probe(self) -> None:
        """An idle engine must be as good as new: it knows an answer, and holds nothing else."""
        stats = self.core.stats()
        if stats.num_free_blocks != stats.num_blocks:
            raise IntegrityError(
                f"{stats.num_blocks - stats.num_free_blocks} blocks never came back"
            )
        num_tokens = sum(client.num_output_tokens for client in self.history.clients)
        if (stats.num_generation_tokens, stats.num_steps) != (num_tokens, self.num_steps):
            raise IntegrityError(
                f"{num_tokens} tokens in {self.num_steps} steps, not as in {stats}"
            )
        self._is_draining = False
        sampling = SamplingParams(max_tokens=1)
        probe = Request(request_id="probe", prompt_token_ids=[1], sampling=sampling, seed=0)
        self._arrive((probe,))
        self.settle()
        if self.runner.num_rows > 1:
            raise IntegrityError(f"the runner keeps {self.runner.num_rows - 1} rows of nobody")

    def step(self) -> None:
        """One step of the engine; then clients read their news and the books are recounted."""
        self.num_steps += 1
        before_s, self._step_start_s = self._step_start_s, self.clock.now()
        outcome: list[RequestEvent] | Exception = []
        try:
            outcome = self.core.step()
        except Exception as error:
            outcome = error
        injections = self.executor.take_injections()
        plan = self.executor.take_plan()
        self.trace.entries.append(TracedStep(self.clock.now(), plan, injections, outcome))
        if self.executor.unexpected is not None:
            raise IntegrityError("the executor cannot carry the plan out") from (
                self.executor.unexpected
            )
        for transfer in plan.transfers if plan is not None else ():
            self.moves[transfer.source_tier, transfer.target_tier] += 1
        self.history.run(share.sequence_id for share in (plan.scheduled if plan else ()))
        for injection in injections:
            self.history.touch(injection)
            if injection.fault is Fault.OUT_OF_MEMORY:  # steps are small for a while
                self._small_until_step = self.num_steps + MAX_STEPS_TO_GROW
        if isinstance(outcome, Exception):
            self._note_death(outcome)
            return
        if not self.setup.asynchronous and self.executor.num_sure_failures_in_a_row > 1:
            raise IntegrityError(f"the engine goes on though {MAX_FAILED_STEPS} steps failed")
        if plan is not None and plan.num_tokens > self.setup.max_num_batched_tokens:
            raise IntegrityError(f"a step of {plan.num_tokens} tokens is over the budget")
        self._check_preemptions(injections)
        self._tell(outcome)
        if sum(event.error_code is FailureCode.OUT_OF_MEMORY for event in outcome) > 1:
            raise IntegrityError("more than one request gave way to others")
        # What an asynchronous loop has planned is seen when it has run: a step later.
        by_s = before_s if self.setup.asynchronous else self._step_start_s
        if overdue := self.history.overdue(by_s):
            raise IntegrityError(f"{overdue} still wait, though their time is over")
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
        num_steps = -(-num_tokens // self.setup.max_num_batched_tokens) + num_output
        # Asynchronously its end is seen a step later, and so is the room that it leaves.
        return num_steps + (2 if self.setup.asynchronous else 0)

    def _check_preemptions(self, injections: list[Injection]) -> None:
        """Nobody is pushed out of a pool that has room for all of everyone.

        Priority may push out for places, asynchronously who has ended still holds blocks, and who
        was given a block that got lost, or was in a step that failed, starts anew.
        """
        before, self._num_preemptions = self._num_preemptions, self.core.stats().num_preemptions
        setup = self.setup
        if self._num_preemptions == before or setup.policy == "priority" or setup.asynchronous:
            return
        if any(i.fault is Fault.LOST_BLOCK or i.fault in FAILURES for i in injections):
            return
        clients = self.history.live.values()
        needed = sum(self._num_needed_blocks(client.max_num_tokens + 1) for client in clients)
        if needed <= setup.num_blocks - self.allocator.num_hidden_blocks:
            raise IntegrityError(f"somebody was pushed out, though {needed} blocks hold everyone")

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
            case Arrive():
                self._arrive(action.requests)
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

    def _arrive(self, requests: tuple[Request, ...]) -> None:
        """A request comes, with its siblings; all are taken, or none."""
        if self._is_draining:
            self.history.refuse()
            return
        names = ", ".join(request.request_id for request in requests)
        must_refuse = any(self._must_refuse(request) for request in requests)
        try:
            self.core.add(*requests)
        except RequestError as error:
            if not must_refuse:
                raise IntegrityError(f"{names} was refused: {error}") from error
            self.history.refuse()
            return
        except OverloadedError as error:
            self._check_overload(requests, error)
            self.history.refuse()
            return
        if must_refuse:
            raise IntegrityError(f"{names} can never run, but was accepted")
        clients = [
            self.history.accept(
                request, self._max_tokens(request), at_s=self.clock.now(), step=self.num_steps
            )
            for request in requests
        ]
        limit = self.setup.max_num_queued
        if limit is not None and self.core.stats().num_waiting > limit:
            raise IntegrityError(f"more than {limit} requests may wait")
        for client in clients:
            client.together = clients
        if self.setup.is_orderly and not self.allocator.num_hidden_blocks:
            # Its siblings may be overtaken while they wait for the prompt: they have no due time.
            clients[0].due_step = self._step_when_idle()

    def _max_tokens(self, request: Request) -> int:
        room = self.setup.max_model_len - len(request.prompt_token_ids)
        return request.sampling.max_tokens or room

    def _must_refuse(self, request: Request) -> bool:
        """Whether a request can never run: no tokens, no context, no memory, or its id is taken."""
        setup = self.setup
        max_tokens = self._max_tokens(request)
        num_tokens = len(request.prompt_token_ids) + max_tokens
        num_blocks = self._num_needed_blocks(num_tokens)
        return (
            not request.prompt_token_ids
            or max_tokens < 1
            or num_tokens > setup.max_model_len
            or num_blocks > setup.num_blocks
            or request.request_id in self.history.live
        )

    def _num_needed_blocks(self, num_tokens: int) -> int:
        """What a request of so many tokens takes at most; the last one is never computed."""
        setup = self.setup
        num_blocks = setup.kv_groups.num_blocks_for(num_tokens - 1, setup.block_size)
        if setup.allocator == "contiguous":
            return -(-(setup.max_model_len - 1) // setup.block_size)
        if setup.allocator == "contiguous-buddy":
            rounded = 1 << (num_blocks - 1).bit_length()
            # A pool of any size is cut into powers of two, the longest of which is its first bit.
            is_had = rounded <= 1 << setup.num_blocks.bit_length() >> 1
            return rounded if is_had else setup.num_blocks + 1
        return num_blocks

    def _check_overload(self, requests: tuple[Request, ...], error: OverloadedError) -> None:
        """A queue may be full, and a deadline out of reach; nothing else is overload."""
        limit = self.setup.max_num_queued
        is_full = limit is not None and self.core.stats().num_waiting + len(requests) > limit
        if not is_full and requests[0].options.deadline_ms is None:
            raise IntegrityError(f"{requests[0].request_id} was turned away: {error}") from error

    def _step_when_idle(self) -> int:
        """By when all who are here must have been answered."""
        live = self.history.live.values()
        num_steps = sum(map(self.num_service_steps, live))
        num_steps += max(0, self._small_until_step - self.num_steps)
        if not self.setup.is_orderly:
            # Age does not protect here: each may be pushed out, and wait for a batch, once for
            # every other request. No promise to clients, but an end.
            num_steps = (num_steps + NUM_WINDOW_STEPS) * (len(live) + 1)
        return self.num_steps + num_steps

    def _squeeze(self, num_blocks: int) -> None:
        """Memory gets scarce, or comes back; who lived through it has no due time."""
        self.allocator.num_hidden_blocks = num_blocks
        self.history.forget_due_times()

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
        if sum(stats.waiting_by_reason.values()) != stats.num_waiting:
            raise IntegrityError(f"{stats.num_waiting} wait, for {stats.waiting_by_reason}")
        if stats.num_running > self.setup.max_num_seqs:
            raise IntegrityError(f"{stats.num_running} run at once")
