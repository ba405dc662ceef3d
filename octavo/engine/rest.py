"""Whether an engine is awake, and its way to sleep and back, as the front end sees it.

Knows neither processes nor HTTP: what is to be asked of an engine comes as functions.

    awake ─▶ finishing ─▶ falling asleep ─▶ asleep ─▶ waking up ─▶ awake

From `finishing` on nothing new is taken. A step that fails leads back to where it started.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from typing import Any, TypeVar

from octavo.core import SleepReport
from octavo.errors import OverloadedError, SleepingError

T = TypeVar("T")

RETRY_AFTER_S = 5.0  # who wakes it, and when, nobody knows here
_POLL_S = 0.02


class Phase(StrEnum):
    """Where an engine is between awake and asleep."""

    AWAKE = "awake"
    FINISHING = "finishing"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING_UP = "waking up"


_MEANINGS = {
    Phase.AWAKE: "the engine is awake",
    Phase.FINISHING: "the engine falls asleep as soon as accepted requests have ended",
    Phase.FALLING_ASLEEP: "the engine falls asleep",
    Phase.ASLEEP: "the engine sleeps until POST /wake_up",
    Phase.WAKING_UP: "the engine wakes up",
}


class Rest:
    """The sleep of one engine. Sole writer of its phase; one change at a time, others wait.

    is_idle: whether no request is left; raises where the engine is dead.
    abort_all: ends all requests, each with its terminal event.
    sleep, wake_up: have the engine do it, however long that takes.
    """

    def __init__(
        self,
        *,
        is_idle: Callable[[], bool],
        abort_all: Callable[[], None],
        sleep: Callable[[int], Awaitable[SleepReport]],
        wake_up: Callable[[], Awaitable[None]],
    ):
        self.phase = Phase.AWAKE
        self.report: SleepReport | None = None  # while asleep
        self._is_idle = is_idle
        self._abort_all = abort_all
        self._sleep = sleep
        self._wake_up = wake_up
        self._turn = asyncio.Lock()

    @property
    def is_awake(self) -> bool:
        """Whether requests are taken."""
        return self.phase is Phase.AWAKE

    @property
    def is_undisturbed(self) -> bool:
        """Whether the engine has no requests, and owes no steps: nobody may call it slow."""
        return self.phase not in (Phase.AWAKE, Phase.FINISHING)

    @property
    def why(self) -> str:
        """A sentence about the phase."""
        return _MEANINGS[self.phase]

    def check_awake(self) -> None:
        """Raise `SleepingError` where nothing new is taken."""
        if not self.is_awake:
            raise SleepingError(self.why, retry_after_s=RETRY_AFTER_S)

    async def sleep(
        self, level: int = 1, *, timeout_s: float = 0.0, abort: bool = False
    ) -> SleepReport:
        """Let the engine sleep at least so deep, once its requests have ended.

        timeout_s: how long they may take; `abort` ends them at once instead.

        Raises:
            OverloadedError: some took longer: the engine stays awake, and they go on.
        """
        return await _to_the_end(self._fall_asleep(level, timeout_s, abort))

    async def wake_up(self) -> None:
        """Let the engine be what it was before it fell asleep."""
        await _to_the_end(self._be_woken())

    async def _fall_asleep(self, level: int, timeout_s: float, abort: bool) -> SleepReport:
        async with self._turn:
            if self.report is not None and self.report.level >= level:
                return self.report
            before = self.phase
            try:
                if before is Phase.AWAKE:
                    self.phase = Phase.FINISHING
                    if abort:
                        self._abort_all()
                    await self._until_idle(timeout_s)
                self.phase = Phase.FALLING_ASLEEP
                self.report = await self._sleep(level)
            except BaseException:
                self.phase = before
                raise
            self.phase = Phase.ASLEEP
            return self.report

    async def _until_idle(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while not self._is_idle():
            if time.monotonic() >= end_s:
                raise OverloadedError(
                    f"accepted requests took longer than {timeout_s:g} s, so the engine stays "
                    "awake: allow a longer timeout_s, or end them with mode=abort"
                )
            await asyncio.sleep(_POLL_S)

    async def _be_woken(self) -> None:
        async with self._turn:
            if self.phase is Phase.AWAKE:
                return
            self.phase = Phase.WAKING_UP
            try:
                await self._wake_up()
            except BaseException:
                self.phase = Phase.ASLEEP
                raise
            self.phase, self.report = Phase.AWAKE, None


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Its result, though who asked may not wait for it: half a change would be neither state."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)
