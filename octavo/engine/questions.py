"""What operators ask of an engine in another process, answered between two of its steps.

Owns the questions that have no answer yet. Knows neither requests nor streams.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from octavo.core import Adapter, RequestStatus, SleepReport
from octavo.engine.messages import (
    Explain,
    ListExpertTokens,
    ListRequests,
    LoadAdapter,
    Question,
    ResetPrefixCache,
    Sleep,
    UnloadAdapter,
    WakeUp,
)
from octavo.errors import OverloadedError, UnknownModelError

ANSWER_TIMEOUT_S = 10.0  # for operators, who should hear if a step hangs


class Questions:
    """Asks one engine, and waits. Its answers come by `answer` and `refuse`, by number.

    send: takes a question to the engine; raises where nobody would answer.
    """

    def __init__(self, send: Callable[[Question], None]):
        self._send = send
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self.adapters: dict[str, Adapter] = {}  # those that requests may name

    async def why(self, request_id: str) -> dict[str, list[str]]:
        """See `EngineOperations.why`."""
        stories: dict[str, list[str]] = await self._ask(Explain(next(self._numbers), request_id))
        return stories

    async def requests(self) -> list[RequestStatus]:
        """See `EngineOperations.requests`."""
        statuses: list[RequestStatus] = await self._ask(ListRequests(next(self._numbers)))
        return statuses

    async def expert_tokens(self) -> dict[str, list[int]]:
        """See `EngineOperations.expert_tokens`."""
        counted: dict[str, list[int]] = await self._ask(ListExpertTokens(next(self._numbers)))
        return counted

    async def reset_prefix_cache(self) -> None:
        """See `EngineOperations.reset_prefix_cache`."""
        await self._ask(ResetPrefixCache(next(self._numbers)))

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> Adapter:
        """See `EngineOperations.load_adapter`."""
        question = LoadAdapter(next(self._numbers), name, path, replace)
        adapter: Adapter = await self._ask(question, patiently=True)
        self.adapters[name] = adapter
        return adapter

    async def unload_adapter(self, name: str) -> Adapter:
        """See `EngineOperations.unload_adapter`."""
        adapter = self.adapters.pop(name, None)
        if adapter is None:
            raise UnknownModelError("no adapter of that name is loaded", param="lora_name")
        # What was sent before is with the engine before this.
        await self._ask(UnloadAdapter(next(self._numbers), name), patiently=True)
        return adapter

    async def sleep(self, level: int) -> SleepReport:
        """Have the engine sleep, however long that takes."""
        report: SleepReport = await self._ask(Sleep(next(self._numbers), level), patiently=True)
        return report

    async def wake_up(self) -> None:
        """Have it wake up: reading weights again takes as long as it takes."""
        await self._ask(WakeUp(next(self._numbers)), patiently=True)

    def answer(self, number: int, content: Any) -> None:
        """Here is what was asked for; nobody may wait for it any more."""
        if (waiting := self._waiting_for(number)) is not None:
            waiting.set_result(content)

    def refuse(self, number: int, error: Exception) -> None:
        """There is no answer to this one."""
        if (waiting := self._waiting_for(number)) is not None:
            waiting.set_exception(error)

    def refuse_all(self, error: Exception) -> None:
        """There will be no more answers."""
        for number in list(self._open):
            self.refuse(number, error)

    def _waiting_for(self, number: int) -> "asyncio.Future[Any] | None":
        waiting = self._open.get(number)
        return None if waiting is None or waiting.done() else waiting

    async def _ask(self, question: Question, *, patiently: bool = False) -> Any:
        self._send(question)
        waiting = asyncio.get_running_loop().create_future()
        self._open[question.number] = waiting
        try:
            return await asyncio.wait_for(waiting, None if patiently else ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise OverloadedError("the engine is in a step, and has not answered yet") from None
        finally:
            del self._open[question.number]
