"""The engine loop. Knows no sockets, no text, no tensors: clock and executor are arguments."""

import contextlib
import logging
from functools import partial
from typing import NoReturn

from octavo.core import (
    CacheFile,
    EngineStats,
    Executor,
    FailureCode,
    FinishReason,
    Launch,
    PendingResult,
    Request,
    RequestEvent,
    RequestStatus,
    Sleeper,
    SleepReport,
    StepPlan,
)
from octavo.engine.adapters import AdapterRegistry
from octavo.errors import ConfigError, EngineDeadError, OverloadedError, SleepingError
from octavo.scheduler import Scheduler, adapters_in_use

logger = logging.getLogger(__name__)

SLEEP_LEVELS = (1, 2)  # weights are kept on the host, or read again at the end
MAX_FAILED_STEPS = 2  # in a row; one may be bad luck, the next means that the device is gone
_NO_MEMORY = "a step found no memory, and this request gave way to the others in it"


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
        sleeper: Sleeper | None = None,
        adapters: AdapterRegistry | None = None,
        file: CacheFile | None = None,
        check_integrity: bool = False,
    ):
        self._scheduler = scheduler
        self._executor = executor
        self._check_integrity = check_integrity
        self._num_failed_steps = 0
        self._launch = launch
        self._sleeper = sleeper
        self.adapters = adapters or AdapterRegistry()
        self.adapters.in_use = partial(adapters_in_use, scheduler)
        self._file = file  # None: no cached content outlives the process
        self._asleep: SleepReport | None = None
        self._ahead: tuple[StepPlan, PendingResult] | None = None

    def add(self, *requests: Request) -> None:
        """Queue a request, or all the answers to one prompt, which is then computed once.

        Raises `RequestError` or `OverloadedError` where they cannot be taken; none is then.
        """
        if self._asleep is not None:
            raise SleepingError("the engine sleeps: wake it up first")
        if requests[0].options.adapter is not None:
            requests = tuple(map(self.adapters.current, requests))
        self._scheduler.add(*requests)

    def abort(self, request_ids: list[str]) -> list[RequestEvent]:
        """End requests; each one still alive gets its terminal event, the others none."""
        return self._scheduler.abort(request_ids)

    @property
    def has_work(self) -> bool:
        """True while some request has had no terminal event, or a step is in flight."""
        return self._scheduler.has_work or self._ahead is not None

    def step(self) -> list[RequestEvent]:
        """Expire, plan, run, commit: one pass of the model, and all the news."""
        events = self._scheduler.expire()
        if self._launch is not None:
            return events + self._step_ahead(self._launch)
        plan = self._scheduler.schedule()
        try:
            events += self._scheduler.commit(plan, self._executor.execute(plan))
        except Exception as error:
            return events + self._fail(plan, error)
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

    def reset_prefix_cache(self, *, on_disk: bool = True) -> None:
        """No content that is cached now will be found again; nothing that runs is touched.

        on_disk: nor by an engine that starts later. Raises `OSError` where the file stays.
        """
        self._scheduler.allocator.forget_all()
        self._scheduler.images.forget_all()
        if self._file is not None and on_disk:
            if self._ahead is not None:  # it may be about to write to the file, or to read from it
                with contextlib.suppress(Exception):  # told when its result is read
                    self._ahead[1].result()
            self._file.empty()

    def sleep(self, level: int = 1) -> SleepReport:
        """Give up the memory behind the executor until `wake_up`; cached content is forgotten.

        What lies on disk stays there, for the next start.

        Asleep already, it only goes deeper, if `level` is. Where it fails, it stays as it was.

        Raises:
            OverloadedError: requests are alive.
            ConfigError: there is no such level, or no memory that could be given up.
        """
        if level not in SLEEP_LEVELS:
            raise ConfigError(f"there is no sleep level {level}: choose one of {SLEEP_LEVELS}")
        if self._sleeper is None:
            raise ConfigError("this engine has no executor that could sleep")
        if self.has_work:
            raise OverloadedError("requests are alive: they must end before the engine sleeps")
        if self._asleep is None or self._asleep.level < level:
            self.reset_prefix_cache(on_disk=False)
            self._asleep = self._sleeper.sleep(level)
        return self._asleep

    def wake_up(self) -> None:
        """Take the memory back; where that fails, the engine sleeps on. Awake, nothing happens."""
        if self._sleeper is not None and self._asleep is not None:
            self._sleeper.wake_up()
            self._asleep = None

    def expert_tokens(self) -> dict[str, list[int]]:
        """How many tokens each expert got: {layer: one number an expert}, since the start.

        Empty where nobody counts them, and asleep. Waits for the device.
        """
        return {} if self._sleeper is None else self._sleeper.expert_tokens()

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        return self._scheduler.stats()

    def why(self, request_id: str) -> dict[str, list[str]]:
        """What happened to live and recently finished requests whose ids begin with this."""
        return self._scheduler.decisions.why(request_id)

    def _succeed(self, events: list[RequestEvent]) -> list[RequestEvent]:
        self._num_failed_steps = 0
        self.adapters.drop_unused()
        if self._check_integrity:
            self._scheduler.check_integrity()
        return events

    def _fail(self, plan: StepPlan, error: Exception) -> list[RequestEvent]:
        """Undo a failed step and end those whom it costs; give up where the one before failed, too.

        Where it found no memory, that is who gives way first; the others are computed again, in
        smaller steps. Otherwise it is everyone in it: nobody knows whose fault it was.
        """
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            logger.error("a step failed, as did the one before", exc_info=error)
            raise EngineDeadError(
                f"{MAX_FAILED_STEPS} steps in a row failed, the last with "
                f"{type(error).__name__}: {error}"
            ) from error
        out_of_memory = isinstance(error, MemoryError)
        plans = [plan, *self._abandon_ahead()]
        ran_ids = self._scheduler.discard(*plans, out_of_memory=out_of_memory)
        failure = FinishReason.ERROR
        if out_of_memory:
            logger.error("a step found no memory; one request gives way", exc_info=error)
            return self._scheduler.end(ran_ids[:1], failure, _NO_MEMORY, FailureCode.OUT_OF_MEMORY)
        logger.error("a step failed; its requests end with an error", exc_info=error)
        return self._scheduler.end(ran_ids, failure, "the step that this request was in failed")

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
