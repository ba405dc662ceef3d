"""The engine loop. Knows no sockets, no text, no tensors: clock and executor are arguments."""

import contextlib
import logging
from typing import NoReturn

from octavo.core import (
    EngineStats,
    Executor,
    Launch,
    PendingResult,
    Request,
    RequestEvent,
    RequestStatus,
    StepPlan,
)
from octavo.errors import EngineDeadError
from octavo.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 2  # in a row; one may be bad luck, the next means that the device is gone


class EngineCore:
    """Scheduler and executor, and the step that joins them. Sole caller of both.

    With `launch`, step n+1 is planned and launched before the result of step n is read, so that
    the device never waits for the scheduler. The answers are the same. It is the executor's own
    where that only hands work to a device, a thread's otherwise, or whatever a simulation wants.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        launch: Launch | None = None,
        check_integrity: bool = False,
    ):
        self._scheduler = scheduler
        self._executor = executor
        self._check_integrity = check_integrity
        self._num_failed_steps = 0
        self._launch = launch
        self._ahead: tuple[StepPlan, PendingResult] | None = None

    def add(self, *requests: Request) -> None:
        """Queue a request, or all the answers to one prompt, which is then computed once.

        Raises `RequestError` or `OverloadedError` where they cannot be taken; none is then.
        """
        self._scheduler.add(*requests)

    def abort(self, request_ids: list[str]) -> list[RequestEvent]:
        """End requests; each one still alive gets its terminal event, the others none."""
        return self._scheduler.abort(request_ids)

    @property
    def has_work(self) -> bool:
        """True while some request has had no terminal event, or a step is in flight."""
        return self._scheduler.has_work or self._ahead is not None

    def step(self) -> list[RequestEvent]:
        """Plan, run, commit: one pass of the model and the news that came of it."""
        if self._launch is not None:
            return self._step_ahead(self._launch)
        plan = self._scheduler.schedule()
        try:
            events = self._scheduler.commit(plan, self._executor.execute(plan))
        except Exception as error:
            return self._fail(plan, error)
        return self._succeed(events)

    def _step_ahead(self, launch: Launch) -> list[RequestEvent]:
        """Plan and launch a step, then read the one before it."""
        plan = self._scheduler.schedule()
        before, self._ahead = self._ahead, (plan, _launched(launch, plan))
        events = [] if before is None else self._read(*before)
        if not self._scheduler.has_work and self._ahead is not None:
            # Nothing will follow the step in flight: read it, too.
            last, self._ahead = self._ahead, None
            events += self._read(*last)
        return events

    def _read(self, plan: StepPlan, running: PendingResult) -> list[RequestEvent]:
        try:
            events = self._scheduler.commit(plan, running.result())
        except Exception as error:
            return self._fail(plan, error)
        return self._succeed(events)

    def requests(self) -> list[RequestStatus]:
        """All live requests."""
        return self._scheduler.statuses()

    def reset_prefix_cache(self) -> None:
        """No content that is in memory now will be found again; nothing that runs is touched."""
        self._scheduler.allocator.forget_all()

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        return self._scheduler.stats()

    def why(self, request_id: str) -> dict[str, list[str]]:
        """What happened to live and recently finished requests whose ids begin with this."""
        return self._scheduler.decisions.why(request_id)

    def _succeed(self, events: list[RequestEvent]) -> list[RequestEvent]:
        self._num_failed_steps = 0
        if self._check_integrity:
            self._scheduler.check_integrity()
        return events

    def _fail(self, plan: StepPlan, error: Exception) -> list[RequestEvent]:
        """End the requests of a failed step; give up where the one before failed as well."""
        logger.error("a step failed; its requests end with an error", exc_info=error)
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineDeadError(
                f"{MAX_FAILED_STEPS} steps in a row failed, the last with "
                f"{type(error).__name__}: {error}"
            ) from error
        plans = [plan, *self._abandon_ahead()]
        for failed in plans:
            self._scheduler.discard(failed)
        failed_ids = [share.sequence_id for failed in plans for share in failed.scheduled]
        return self._scheduler.fail(failed_ids, "the step that this request was in failed")

    def _abandon_ahead(self) -> list[StepPlan]:
        """Give up the step in flight: it was planned on top of one that failed."""
        if self._ahead is None:
            return []
        (plan, running), self._ahead = self._ahead, None
        with contextlib.suppress(Exception):
            running.result()  # whatever came of it, the runner must be done before it is told more
        return [plan]


def _launched(launch: Launch, plan: StepPlan) -> PendingResult:
    """A launch that fails is read in its turn, like a step that fails later."""
    try:
        return launch(plan)
    except Exception as error:
        return _NeverBegan(error)


class _NeverBegan:
    def __init__(self, error: Exception):
        self._error = error

    def result(self) -> NoReturn:
        raise self._error
