"""An executor that can sleep: give up the memory of KV cache and weights, and take it back.

Owns the model, its runner and its KV storage, alone, so that what it lets go of is freed. Knows no
requests: nobody may need it while it sleeps.

    level 1   KV blocks are freed; weights wait on the host, or stay where the device is the host
    level 2   KV blocks and weights are freed; weights are read from the checkpoint again

A CUDA graph holds the addresses of all that it touches. So graphs go with the KV blocks, and are
captured anew at the end, which takes as long as it did at the start.
"""

import logging
import time
import traceback
from collections.abc import Callable

from octavo.core import PendingResult, SleepReport, StepPlan, StepResult
from octavo.errors import IntegrityError
from octavo.layers import expert_tokens, forget_expert_tokens
from octavo.models import Model
from octavo.runner import (
    HostCopies,
    KVStorage,
    ModelRunner,
    give_back_freed_memory,
    reachable_storages,
    taken_bytes,
)

logger = logging.getLogger(__name__)

MIB = 2**20
STAYS = "weights stay: the device is the host, which would gain nothing by a copy"

Runnable = tuple[ModelRunner, KVStorage]


class SleepableExecutor:
    """Runs plans while it is awake. Satisfies `Executor` and `Sleeper`.

    load: makes the model as it was made at first.
    prepare: makes a runner of a model, with KV blocks of its own, ready for any step.
    """

    def __init__(
        self,
        model: Model,
        runnable: Runnable,
        *,
        device: str,
        load: Callable[[], Model],
        prepare: Callable[[Model], Runnable],
    ):
        self._device = device
        self._load = load
        self._prepare = prepare
        self._model: Model | None = model  # None: its weights are given up for good
        self._runnable: Runnable | None = runnable  # None: asleep
        self._copies: HostCopies | None = None  # of the model's weights, at level 1
        self._taken_bytes = 0  # when it fell asleep
        self._kv_cache_bytes = 0  # given up then
        forget_expert_tokens(model)  # of the steps that compiled and captured

    def execute(self, plan: StepPlan) -> StepResult:
        """As Executor."""
        return self._runner.execute(plan)

    def launch(self, plan: StepPlan) -> PendingResult:
        """As Launch."""
        return self._runner.launch(plan)

    def expert_tokens(self) -> dict[str, list[int]]:
        """Tokens that each expert got since the start or the last waking, by layer.

        Empty while it sleeps: the counts' memory on the device is given up, too.
        """
        if self._model is None or self._runnable is None:
            return {}
        return expert_tokens(self._model)

    @property
    def _runner(self) -> ModelRunner:
        if self._runnable is None:
            raise IntegrityError("a step was to run on an engine that sleeps")
        return self._runnable[0]

    def sleep(self, level: int) -> SleepReport:
        """Give up memory; asleep at level 1, only what level 2 gives up beyond that."""
        start_s = time.perf_counter()
        if self._runnable is not None:
            self._taken_bytes = taken_bytes(self._device)
            self._kv_cache_bytes = self._runnable[1].num_bytes
        storages = reachable_storages(self._model)
        if level == 1:
            # First, for there may be too little memory on the host: then nothing has changed.
            self._copies = HostCopies(s for s in storages if s.device.type != "cpu")
            weight_bytes = self._copies.num_bytes
        else:
            weight_bytes = sum(s.nbytes() for s in storages)
            weight_bytes += 0 if self._copies is None else self._copies.num_bytes
            self._model = self._copies = None
        self._runnable = None
        del storages
        give_back_freed_memory(self._device)
        report = SleepReport(
            level=level,
            kv_cache_bytes=self._kv_cache_bytes,
            weight_bytes=weight_bytes,
            host_weight_bytes=0 if self._copies is None else self._copies.num_bytes,
            freed_bytes=max(0, self._taken_bytes - taken_bytes(self._device)),
            seconds=time.perf_counter() - start_s,
            note=STAYS if level == 1 and not weight_bytes else "",
        )
        logger.info("%s", describe(report))
        return report

    def wake_up(self) -> None:
        """Take the memory back. Where that fails, it is given up again, and nothing has changed."""
        start_s = time.perf_counter()
        model = self._model
        try:
            if self._copies is not None:
                self._copies.restore()
            if model is None:
                model = self._load()
            self._runnable = self._prepare(model)
        except Exception as error:
            if self._copies is not None:
                self._copies.release()
            del model
            traceback.clear_frames(error.__traceback__)  # they hold what was made so far
            give_back_freed_memory(self._device)
            raise
        forget_expert_tokens(model)
        self._model, self._copies = model, None
        give_back_freed_memory(self._device)  # the copies, and what loading took
        logger.info("awake after %.1f s", time.perf_counter() - start_s)


def describe(report: SleepReport) -> str:
    """One line for the log."""
    facts = [
        f"KV cache {report.kv_cache_bytes / MIB:.1f} MiB",
        f"weights {report.weight_bytes / MIB:.1f}",
        f"measured {report.freed_bytes / MIB:.1f}",
    ]
    if report.host_weight_bytes:
        facts.append(f"weights on the host {report.host_weight_bytes / MIB:.1f}")
    note = f"; {report.note}" if report.note else ""
    gone = ", ".join(facts)
    return f"asleep at level {report.level} after {report.seconds:.1f} s: gave up {gone}{note}"
