"""The engine loop. Knows no sockets, no text, no tensors: clock and executor are arguments."""

import logging

from octavo.core import EngineStats, Executor, Request, RequestEvent
from octavo.errors import EngineDeadError
from octavo.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 2  # in a row; one may be bad luck, the next means that the device is gone


class EngineCore:
    """Scheduler and executor, and the step that joins them. Sole caller of both."""

    def __init__(self, scheduler: Scheduler, executor: Executor, *, check_integrity: bool = False):
        self._scheduler = scheduler
        self._executor = executor
        self._check_integrity = check_integrity
        self._num_failed_steps = 0

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError` where it can never run."""
        self._scheduler.add(request)

    def abort(self, request_ids: list[str]) -> list[RequestEvent]:
        """End requests; each one still alive gets its terminal event, the others none."""
        return self._scheduler.abort(request_ids)

    @property
    def has_work(self) -> bool:
        """True while some request has had no terminal event."""
        return self._scheduler.has_work

    def step(self) -> list[RequestEvent]:
        """Plan, run, commit: one pass of the model and the news that came of it."""
        plan = self._scheduler.schedule()
        try:
            result = self._executor.execute(plan)
            events = self._scheduler.commit(plan, result)
        except Exception as error:
            self._count_failure(error)
            failed = [share.sequence_id for share in plan.scheduled]
            return self._scheduler.fail(failed, "the step that this request was in failed")
        self._num_failed_steps = 0
        if self._check_integrity:
            self._scheduler.check_integrity()
        return events

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        return self._scheduler.stats()

    def _count_failure(self, error: Exception) -> None:
        """Log a failed step with its cause; give up where the one before failed as well."""
        logger.exception("a step failed; its requests end with an error")
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineDeadError(
                f"{MAX_FAILED_STEPS} steps in a row failed, the last with "
                f"{type(error).__name__}: {error}"
            ) from error
