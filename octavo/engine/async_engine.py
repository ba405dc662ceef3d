"""The engine as a server sees it: a child process behind a socket, and streams of text.

Owns the open streams. Knows no HTTP.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection

from octavo import errors
from octavo.core import (
    NO_IMAGES,
    EngineStats,
    PoolingParams,
    Request,
    RequestEvent,
    RequestOptions,
    SamplingParams,
    SeenImages,
)
from octavo.engine.answers import Answer, banned_by, check_request, check_shape, fan_out
from octavo.engine.child import STOP_TIMEOUT_S, EngineProcess
from octavo.engine.interface import DEFAULT_OPTIONS, Pulse, ServedModel, TextDelta
from octavo.engine.messages import (
    AbortRequests,
    AddRequests,
    Fatal,
    News,
    PhaseDone,
    Question,
    Ready,
    Refused,
    Told,
    Unable,
)
from octavo.engine.postmortem import cause_of_error
from octavo.engine.questions import Questions
from octavo.engine.rest import Phase, Rest
from octavo.errors import EngineDeadError, OctavoError, OverloadedError, RequestError
from octavo.text import Tokenizer
from octavo.vision.prompts import ImageReader

logger = logging.getLogger(__name__)

_DOING = {
    Phase.FALLING_ASLEEP: "while it fell asleep",
    Phase.ASLEEP: "while it slept",
    Phase.WAKING_UP: "while it woke up",
}


class _Stream:
    """One user request: its unfinished answers and the deltas that its one reader has not read.

    No asyncio.Queue, for that asks which loop runs at every wait: on Python 3.11 a system call.
    """

    def __init__(self) -> None:
        self.open: dict[str, Answer] = {}  # engine request id -> answer
        self._unread: deque[TextDelta | OctavoError] = deque()
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] | None = None  # what the reader waits for

    @property
    def is_over(self) -> bool:
        """Nothing is left to be read, and nothing will come."""
        return not (self.open or self._unread)

    def put(self, delta: TextDelta | OctavoError) -> None:
        self._unread.append(delta)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def get(self) -> TextDelta | OctavoError:
        while not self._unread:
            self._news = self._loop.create_future()
            await self._news
        return self._unread.popleft()


class AsyncEngine:
    """Many concurrent callers, one engine process. Satisfies `ServingEngine`.

    All methods belong to one event loop. Sole writer of the streams.
    """

    def __init__(
        self,
        process: EngineProcess,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_num_queued_reqs: int = 1024,
        images: ImageReader | None = None,
    ):
        self._process = process
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._images = images  # None: the model sees none
        self._max_num_queued_reqs = max_num_queued_reqs
        self._streams: dict[str, _Stream] = {}  # engine request id -> its stream
        self._num_read = 0  # messages to the engine, as far as it has seen them
        self._dead: EngineDeadError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._phase = "before its first phase of loading was done"
        self.operations = Questions(self._send)
        self.rest = _rest_of(self)

    async def start(self, on_phase: Callable[[str, float], None] = lambda phase, s: None) -> None:
        """Wait until the engine takes requests; raises what stopped it from getting there."""
        self._process.connect()
        watch = asyncio.create_task(
            self._process.watch(lambda: self._die(self._process.death(_doing_of(self))))
        )
        while True:
            message = await self._process.receive_loading(watch, self._phase)
            if isinstance(message, PhaseDone):
                self._phase = f"while it loaded, after the phase {message.phase!r}"
                on_phase(message.phase, message.seconds)
            elif isinstance(message, Ready):
                break
            elif isinstance(message, Fatal):
                watch.cancel()
                raise _as_exception(message, self._phase)
        self._ready = message
        self._stats = message.stats
        self.operations.adapters = {adapter.name: adapter for adapter in message.adapters}
        self.model = ServedModel(
            self._model_name,
            message.max_model_len,
            message.vocab_size,
            self._tokenizer,
            message.tasks,
            self._images,
        )
        self._tasks = [watch, asyncio.create_task(self._read_news())]

    async def stop(self) -> None:
        """End the engine process; open streams get an error."""
        for task in self._tasks:
            task.cancel()
        # One that was given up does not listen any more.
        patience_s = STOP_TIMEOUT_S if self._dead is None else 0.5
        self._die(EngineDeadError("the engine was stopped"))
        await asyncio.to_thread(self._process.stop, patience_s)

    def check_room(self, num_sequences: int = 1) -> None:
        """See `ServingEngine.check_room`."""
        room = self._ready.max_num_seqs + self._max_num_queued_reqs
        if len(self._streams) + num_sequences > room:
            raise OverloadedError(
                f"{len(self._streams)} requests are running or waiting, and at most {room} may be"
            )

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
        *,
        pooling: PoolingParams | None = None,
        images: SeenImages = NO_IMAGES,
    ) -> AsyncIterator[TextDelta]:
        """See `ServingEngine.generate`."""
        self.check_health()
        check_request(
            prompt_token_ids,
            sampling,
            vocab_size=self.model.vocab_size,
            max_model_len=self.model.max_model_len,
            has_text=self.model.has_text,
            tasks=self.model.tasks,
            pooling=pooling,
        )
        if sampling.structured_outputs is not None:
            await asyncio.to_thread(check_shape, sampling, self._ready.eos_token_ids)
        self.rest.check_awake()
        self.check_room(sampling.num_sequences)
        stream = _Stream()
        template = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            seed=0,
            eos_token_ids=self._ready.eos_token_ids,
            banned=banned_by(sampling, self._tokenizer, vocab_size=self.model.vocab_size),
            options=options,
            pooling=pooling,
            images=images,
        )
        requests = list(fan_out(template))
        for index, request in enumerate(requests[: sampling.n]):
            stream.open[request.request_id] = Answer(index, request, self._tokenizer)
            self._streams[request.request_id] = stream
        self._process.send(AddRequests(requests))
        try:
            while not stream.is_over:
                delta = await stream.get()
                if isinstance(delta, OctavoError):
                    raise delta
                yield delta
        finally:
            if stream.open:
                self._forget(list(stream.open))

    def stats(self) -> EngineStats:
        """The latest gauges."""
        return self._stats

    def check_health(self) -> None:
        """Raise `EngineDeadError` where the engine cannot answer any more."""
        if self._dead is not None:
            raise self._dead

    @property
    def live(self) -> Collection[str]:
        """See `ServingEngine.live`."""
        return self._streams.keys()

    @property
    def is_busy(self) -> bool:
        """See `ServingEngine.is_busy`."""
        if self.rest.is_undisturbed:
            return False
        has_requests = self._stats.num_running + self._stats.num_waiting > 0
        return bool(self._streams) or has_requests or self._num_read < self._process.num_sent

    def examine(self) -> Pulse:
        """See `ServingEngine.examine`."""
        is_on_cpu = ("device", "cpu") in {(name, value) for name, value, *_ in self.settings}
        return self._process.examine(on_cpu=is_on_cpu)

    def abandon(self, reason: str) -> None:
        """See `ServingEngine.abandon`."""
        self._die(EngineDeadError(f"the engine was given up: {reason}"))

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        """See `ServingEngine.settings`."""
        return self._ready.settings

    def _send(self, question: Question) -> None:
        """To the engine, which answers between two of its steps."""
        self.check_health()
        self._process.send(question)

    def _forget(self, request_ids: list[str]) -> None:
        """Nobody waits for these any more: free what they hold."""
        for request_id in request_ids:
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                stream.open.pop(request_id, None)
        if self._dead is None:
            self._process.send(AbortRequests(request_ids))

    async def _read_news(self) -> None:
        """Hand every event to its stream until the engine dies."""
        while True:
            message = await self._process.receive()
            if isinstance(message, News):
                self._stats, self._num_read = message.stats, message.num_read
                stopped = [e.request_id for e in message.events if self._deliver(e)]
                if stopped:
                    self._forget(stopped)
            elif isinstance(message, Refused):
                refused = self._streams.pop(message.request_id, None)
                if refused is not None:
                    refused.open.pop(message.request_id, None)
                    refused.put(_refusal(message))
            elif isinstance(message, Told):
                self.operations.answer(message.number, message.content)
            elif isinstance(message, Unable):
                self.operations.refuse(message.number, _inability(message))
            elif isinstance(message, Fatal):
                self._die(
                    EngineDeadError(cause_of_error(message.kind, message.message, _doing_of(self)))
                )
                return

    def _deliver(self, event: RequestEvent) -> bool:
        """Pass an event on; True where the answer is over and the engine does not know yet."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            return False  # it was aborted, and its last event crossed the abort on the way
        answer = stream.open[event.request_id]
        try:
            stream.put(answer.update(event))
        except Exception:  # a bug in turning these ids to text must not end the other streams
            logger.exception("request %s fails: its output could not be read", event.request_id)
            stream.put(OctavoError("the output could not be turned into text"))
            return True
        if event.finish_reason is not None:
            del stream.open[event.request_id], self._streams[event.request_id]
            return False
        return answer.finish_reason is not None

    def _die(self, error: EngineDeadError) -> None:
        if self._dead is None:
            self._dead = error
        self.operations.refuse_all(self._dead)
        for stream in set(self._streams.values()):
            stream.open.clear()
            stream.put(self._dead)
        self._streams.clear()


def _doing_of(engine: AsyncEngine) -> str:
    """What the engine did when it was last heard of, to follow what became of it."""
    if not engine._tasks:
        return engine._phase
    num_steps = engine._stats.num_steps
    if engine.rest.is_undisturbed:
        return f"{_DOING[engine.rest.phase]}, after step {num_steps}"
    return f"in step {num_steps + 1}" if engine._streams else f"after step {num_steps}, at rest"


def _rest_of(engine: AsyncEngine) -> Rest:
    """How this engine sleeps."""

    def is_idle() -> bool:
        engine.check_health()
        return not engine.is_busy

    return Rest(
        is_idle=is_idle,
        abort_all=lambda: engine._process.send(AbortRequests(list(engine._streams))),
        sleep=engine.operations.sleep,
        wake_up=engine.operations.wake_up,
    )


def _inability(answer: Unable) -> OctavoError:
    """Why a question could not be answered, as an exception of its own class."""
    kind = getattr(errors, answer.kind)
    if issubclass(kind, RequestError):
        wrong: RequestError = kind(answer.message, param=answer.param)
        return wrong
    return OctavoError(answer.message)


def _refusal(refusal: Refused) -> OctavoError:
    """The exception behind a refusal, of its own class."""
    if refusal.kind == OverloadedError.__name__:
        return OverloadedError(refusal.message, retry_after_s=refusal.retry_after_s)
    kind = getattr(errors, refusal.kind, RequestError)
    error: RequestError = kind(refusal.message, param=refusal.param)
    return error


def _as_exception(fatal: Fatal, phase: str) -> OctavoError:
    """The exception that stopped the engine's start, of its own class where it is one of ours."""
    kind = getattr(errors, fatal.kind, None)
    if isinstance(kind, type) and issubclass(kind, OctavoError):
        return kind(fatal.message)
    return EngineDeadError(cause_of_error(fatal.kind, fatal.message, phase))
