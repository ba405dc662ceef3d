"""The answers to one HTTP request, from the engine's iterators to batches ready for a socket.

Owns the merging of several prompts, the watch for a client that goes away, the closing of the
engine's iterators in every case, and the latency books. Knows no JSON and no OpenAI.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import cast

from starlette.types import Receive

from octavo.core import (
    FailureCode,
    FinishReason,
    PoolingParams,
    RequestOptions,
    SamplingParams,
)
from octavo.engine import ServingEngine, TextDelta
from octavo.errors import OverloadedError, RequestError
from octavo.server.errors import ClientDisconnected, HttpError, failed, unavailable
from octavo.server.metrics import ServerMetrics
from octavo.server.prompts import Prompt


@dataclass(slots=True)
class Tally:
    """The books of one answer."""

    num_prompt_tokens: int
    num_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt
    queue_time_s: float = 0.0  # this and the next as the engine measured them
    prefill_time_s: float = 0.0
    first_token_s: float = 0.0  # or when the prompt was computed, where there are no tokens
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What the engine is to do with each prompt."""

    sampling: SamplingParams
    options: RequestOptions
    pooling: PoolingParams | None = None


_DONE = (FinishReason.STOP, FinishReason.LENGTH)
Batch = list[tuple[int, TextDelta]]  # choice index (prompt * n + i) and what came for it


class Answers:
    """All answers to one HTTP request, read by one consumer.

    One task for each prompt pumps the engine's iterator into a buffer; the consumer takes all that
    is there. So a slow socket gets fewer and larger writes, a full buffer makes the engine keep the
    rest, and cancelling a pump closes its iterator even while the consumer hangs in a write.
    """

    def __init__(
        self,
        engine: ServingEngine,
        prompts: Sequence[Prompt],
        task: Task,
        *,
        response_id: str,
        metrics: ServerMetrics,
        arrival_s: float,
        max_unread_deltas: int,
    ):
        self.prompts = prompts
        self.num_per_prompt = task.sampling.n
        self.tallies = [
            Tally(len(p.token_ids)) for p in prompts for _ in range(self.num_per_prompt)
        ]
        self._engine = engine
        self.task = task
        self.response_id = response_id
        self._metrics = metrics
        self.arrival_s = arrival_s
        self._max_unread_deltas = max_unread_deltas
        self._tasks: list[asyncio.Task[None]] = []
        self._num_pumping = len(prompts)
        self._num_silent = len(prompts)  # of which the engine has said nothing yet
        self._unread: Batch = []
        self.error: Exception | None = None  # the first, if any: nothing goes on after it
        self._news: asyncio.Future[None] | None = None  # the consumer waits for: see `_tell`
        self._room = asyncio.Event()  # for the pumps: the consumer has emptied the buffer

    @asynccontextmanager
    async def running(self, receive: Receive) -> AsyncIterator[None]:
        """Generate inside the block; leaving it, in whatever way, frees what the engine holds."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._pump(i)) for i in range(len(self.prompts))]
        self._tasks.append(asyncio.create_task(self._watch(receive)))
        try:
            yield
        finally:
            self._fail(ClientDisconnected())  # of no effect where all is well or failed already
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._close_books()

    def _close_books(self) -> None:
        """Give a reason to the answers that the engine has not ended, unless it never took them."""
        match self.error:
            case ClientDisconnected():
                reason = FinishReason.ABORT
            case RequestError() | OverloadedError():
                return
            case _:
                reason = FinishReason.ERROR
        for tally in self.tallies:
            if tally.finish_reason is None:
                self._finish(tally, reason)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Of all prompts, and of all answers so far."""
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        return num_prompt_tokens, sum(tally.num_tokens for tally in self.tallies)

    @property
    def num_used_tokens(self) -> int:
        """Of prompts that the engine has taken, and of their answers so far.

        Who goes away before the first token pays for the prompt: it may have been computed.
        """
        num_prompt_tokens, num_tokens = self.num_tokens
        if num_tokens or not isinstance(self.error, (RequestError, OverloadedError)):
            num_tokens += num_prompt_tokens
        return num_tokens

    async def first(self) -> None:
        """Wait until the engine has taken every prompt; raises its refusal where it has not."""
        while self._num_silent and self.error is None:
            await self._wait_for_news()
        if self.error is not None:
            raise self.error

    async def batches(self) -> AsyncIterator[Batch]:
        """Whatever has come since the last batch, until all answers have ended."""
        while True:
            if self._unread:
                batch, self._unread = self._unread, []
                self._room.set()
                yield batch
            elif self.error is not None:
                raise self.error
            elif self._num_pumping == 0:
                return
            else:
                await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        # No asyncio.Event: it asks which loop runs at every wait, on Python 3.11 a system call.
        self._news = self._loop.create_future()
        await self._news

    def _tell(self) -> None:
        """Wake the consumer: something came, ended or failed."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _pump(self, prompt_index: int) -> None:
        offset = prompt_index * self.num_per_prompt
        try:
            async with aclosing(self._deltas(prompt_index)) as deltas:
                silent = True
                async for delta in deltas:
                    if silent:
                        silent = False
                        self._num_silent -= 1
                    self._note(self.tallies[offset + delta.index], delta)
                    self._unread.append((offset + delta.index, delta))
                    self._tell()
                    if len(self._unread) >= self._max_unread_deltas:
                        self._room.clear()
                        await self._room.wait()
            if any(t.finish_reason is None for t in self._of_prompt(prompt_index)):
                raise _failure("the engine ended an answer without a reason")
        except asyncio.CancelledError:
            self._fail(
                _cancelled()
            )  # where neither client nor consumer has gone: the engine did it
            raise
        except Exception as error:  # whatever it is, the consumer must hear of it
            self._fail(error)
        self._num_pumping -= 1
        self._tell()

    def _deltas(self, prompt_index: int) -> AsyncGenerator[TextDelta, None]:
        request_id = f"{self.response_id}-{prompt_index}"
        prompt, task = self.prompts[prompt_index], self.task
        deltas = self._engine.generate(
            request_id,
            prompt.token_ids,
            task.sampling,
            task.options,
            pooling=task.pooling,
            images=prompt.images,
        )
        return cast("AsyncGenerator[TextDelta, None]", deltas)  # "closing the iterator aborts"

    def _of_prompt(self, prompt_index: int) -> list[Tally]:
        offset = prompt_index * self.num_per_prompt
        return self.tallies[offset : offset + self.num_per_prompt]

    def _note(self, tally: Tally, delta: TextDelta) -> None:
        if delta.token_ids:
            now = time.monotonic()
            if tally.num_tokens:
                gap_s = (now - tally.last_token_s) / len(delta.token_ids)
                self._metrics.inter_token_latency.observe(gap_s)
            else:
                self._note_first(tally, delta, now)
            tally.last_token_s = now
            tally.num_tokens += len(delta.token_ids)
            tally.num_cached_tokens += delta.num_cached_tokens
        elif delta.finish_reason in _DONE and not tally.num_tokens:  # only the prompt was wanted
            self._note_prefill(tally, delta, time.monotonic())
            tally.num_cached_tokens += delta.num_cached_tokens
        if delta.finish_reason is not None:
            self._finish(tally, delta.finish_reason)
            if delta.finish_reason is FinishReason.ERROR:
                raise _failure(delta.error or "the answer failed", delta.error_code)
            if delta.finish_reason is FinishReason.ABORT:
                raise _cancelled()

    def _note_first(self, tally: Tally, delta: TextDelta, now_s: float) -> None:
        self._metrics.time_to_first_token.observe(now_s - self.arrival_s)
        self._note_prefill(tally, delta, now_s)

    def _note_prefill(self, tally: Tally, delta: TextDelta, now_s: float) -> None:
        tally.first_token_s = tally.last_token_s = now_s
        tally.queue_time_s, tally.prefill_time_s = delta.queue_time_s, delta.prefill_time_s
        metrics = self._metrics
        metrics.request_queue_time.observe(delta.queue_time_s)
        metrics.request_prefill_time.observe(delta.prefill_time_s)

    def _finish(self, tally: Tally, reason: FinishReason) -> None:
        tally.finish_reason = reason
        metrics = self._metrics
        metrics.request_success.labels(reason.value).inc()
        metrics.e2e_request_latency.observe(time.monotonic() - self.arrival_s)
        metrics.request_prompt_tokens.observe(tally.num_prompt_tokens)
        metrics.request_generation_tokens.observe(tally.num_tokens)
        if tally.num_tokens:
            metrics.request_decode_time.observe(tally.last_token_s - tally.first_token_s)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientDisconnected())

    def _fail(self, error: Exception) -> None:
        """The first failure is the request's; nothing of it goes on."""
        self.error = self.error or error
        self._tell()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _failure(message: str, code: FailureCode = FailureCode.GENERATION_FAILED) -> HttpError:
    return HttpError(failed(message, code))


def _cancelled() -> HttpError:
    return HttpError(unavailable("the server cancelled the request", "cancelled"))
