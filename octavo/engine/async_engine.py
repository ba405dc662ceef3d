"""The engine as a server sees it: a child process behind a socket, and streams of text.

Owns the child, the socket and the open streams. Knows no HTTP.
"""

import asyncio
import contextlib
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from octavo import errors
from octavo.config import EngineOptions
from octavo.core import (
    EngineStats,
    Request,
    RequestEvent,
    RequestOptions,
    RequestStatus,
    SamplingParams,
)
from octavo.engine.answers import Answer, check_request, fan_out
from octavo.engine.interface import DEFAULT_OPTIONS, ServedModel, TextDelta
from octavo.engine.messages import (
    AbortRequests,
    AddRequests,
    Explain,
    Fatal,
    ListRequests,
    News,
    PhaseDone,
    Question,
    Ready,
    Refused,
    ResetPrefixCache,
    ToEngine,
    Told,
    decode_from_engine,
    encode,
)
from octavo.errors import EngineDeadError, OctavoError, OverloadedError, RequestError
from octavo.text import Tokenizer

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0


class EngineProcess:
    """The child process and its socket. Started at once, so that it loads while others import."""

    def __init__(self, options: EngineOptions):
        # mkdtemp makes it readable by this user alone: the socket needs no other secret.
        self._directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        address = f"ipc://{self._directory / 'engine'}"
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.set_hwm(0)
        self.socket.bind(address)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "octavo.engine.process", address],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not for the child
        )
        if self.child.stdin is None:
            raise EngineDeadError("the engine process has no standard input")
        self.child.stdin.write(msgspec.json.encode(options) + b"\n")
        self.child.stdin.flush()  # and left open: when it closes, the child exits

    def stop(self) -> None:
        """End the child and remove the socket."""
        if self.child.stdin is not None:
            with contextlib.suppress(OSError):
                self.child.stdin.close()
        try:
            self.child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.socket.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


class _Stream:
    """One user request: its unfinished answers and the deltas that nobody has read yet."""

    def __init__(self) -> None:
        self.open: dict[str, Answer] = {}  # engine request id -> answer
        self.deltas: asyncio.Queue[TextDelta | OctavoError] = asyncio.Queue()


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
    ):
        self._process = process
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._max_num_queued_reqs = max_num_queued_reqs
        self._streams: dict[str, _Stream] = {}  # engine request id -> its stream
        self._questions: dict[int, asyncio.Future[Any]] = {}  # by number, until they are answered
        self._numbers = itertools.count()
        self._dead: EngineDeadError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, on_phase: Callable[[str, float], None] = lambda phase, s: None) -> None:
        """Wait until the engine takes requests; raises what stopped it from getting there."""
        self._socket = zmq.asyncio.Socket.shadow(self._process.socket)
        watch = asyncio.create_task(self._watch_child())
        while True:
            message = await self._receive_or_death(watch)
            if isinstance(message, PhaseDone):
                on_phase(message.phase, message.seconds)
            elif isinstance(message, Ready):
                break
            elif isinstance(message, Fatal):
                watch.cancel()
                raise _as_exception(message)
        self._ready = message
        self._stats = message.stats
        self.model = ServedModel(
            self._model_name, message.max_model_len, message.vocab_size, self._tokenizer
        )
        self._tasks = [watch, asyncio.create_task(self._read_news())]

    async def stop(self) -> None:
        """End the engine process; open streams get an error."""
        for task in self._tasks:
            task.cancel()
        self._die(EngineDeadError("the engine was stopped"))
        await asyncio.to_thread(self._process.stop)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> AsyncIterator[TextDelta]:
        """See `ServingEngine.generate`."""
        self.check_health()
        check_request(
            prompt_token_ids,
            sampling,
            vocab_size=self.model.vocab_size,
            max_model_len=self.model.max_model_len,
            has_text=self.model.has_text,
        )
        self._check_room(sampling.num_sequences)
        stream = _Stream()
        template = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            seed=0,
            eos_token_ids=self._ready.eos_token_ids,
            options=options,
        )
        requests = list(fan_out(template))
        for index, request in enumerate(requests[: sampling.n]):
            stream.open[request.request_id] = Answer(index, request, self._tokenizer)
            self._streams[request.request_id] = stream
        self._send(AddRequests(requests))
        try:
            while stream.open or not stream.deltas.empty():
                delta = await stream.deltas.get()
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

    async def why(self, request_id: str) -> dict[str, list[str]]:
        """See `ServingEngine.why`."""
        stories: dict[str, list[str]] = await self._ask(Explain(next(self._numbers), request_id))
        return stories

    async def requests(self) -> list[RequestStatus]:
        """See `ServingEngine.requests`."""
        statuses: list[RequestStatus] = await self._ask(ListRequests(next(self._numbers)))
        return statuses

    async def reset_prefix_cache(self) -> None:
        """See `ServingEngine.reset_prefix_cache`."""
        await self._ask(ResetPrefixCache(next(self._numbers)))

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        """See `ServingEngine.settings`."""
        return self._ready.settings

    async def _ask(self, question: Question) -> Any:
        """What the engine answers between two of its steps."""
        self.check_health()
        answer = asyncio.get_running_loop().create_future()
        self._questions[question.number] = answer
        self._send(question)
        try:
            return await answer
        finally:
            self._questions.pop(question.number, None)

    def _check_room(self, num_new: int) -> None:
        room = self._ready.max_num_seqs + self._max_num_queued_reqs
        if len(self._streams) + num_new > room:
            raise OverloadedError(
                f"{len(self._streams)} requests are running or waiting, and at most {room} may be"
            )

    def _send(self, message: ToEngine) -> None:
        # ZeroMQ queues without bound and hands over in a thread of its own: this never waits.
        self._socket.send(encode(message))

    def _forget(self, request_ids: list[str]) -> None:
        """Nobody waits for these any more: free what they hold."""
        for request_id in request_ids:
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                stream.open.pop(request_id, None)
        if self._dead is None:
            self._send(AbortRequests(request_ids))

    async def _read_news(self) -> None:
        """Hand every event to its stream until the engine dies."""
        while True:
            message = decode_from_engine(await self._socket.recv())
            if isinstance(message, News):
                self._stats = message.stats
                stopped = [e.request_id for e in message.events if self._deliver(e)]
                if stopped:
                    self._forget(stopped)
            elif isinstance(message, Refused):
                self._refuse(message)
            elif isinstance(message, Told):
                answer = self._questions.get(message.number)
                if answer is not None and not answer.done():  # else: who asked has gone
                    answer.set_result(message.content)
            elif isinstance(message, Fatal):
                self._die(EngineDeadError(f"the engine stopped: {message.message}"))
                return

    def _deliver(self, event: RequestEvent) -> bool:
        """Pass an event on; True where the answer is over and the engine does not know yet."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            return False  # it was aborted, and its last event crossed the abort on the way
        answer = stream.open[event.request_id]
        try:
            stream.deltas.put_nowait(answer.update(event))
        except Exception:  # a bug in turning these ids to text must not end the other streams
            logger.exception("request %s fails: its output could not be read", event.request_id)
            stream.deltas.put_nowait(OctavoError("the output could not be turned into text"))
            return True
        if event.finish_reason is not None:
            del stream.open[event.request_id], self._streams[event.request_id]
            return False
        return answer.finish_reason is not None

    def _refuse(self, refusal: Refused) -> None:
        """The engine did not take a request: its caller gets the exception."""
        stream = self._streams.pop(refusal.request_id, None)
        if stream is not None:
            stream.open.pop(refusal.request_id, None)
            stream.deltas.put_nowait(_refusal(refusal))

    async def _receive_or_death(self, watch: "asyncio.Task[None]") -> object:
        receive = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait([receive, watch], return_when=asyncio.FIRST_COMPLETED)
        if receive.done():
            return decode_from_engine(receive.result())
        receive.cancel()
        raise EngineDeadError(
            f"the engine process ended with code {self._process.child.returncode} while it "
            "started; its log above says why"
        )

    async def _watch_child(self) -> None:
        """Notice within half a second that the child is gone."""
        while self._process.child.poll() is None:
            await asyncio.sleep(0.25)
        await asyncio.sleep(0.1)  # its last words may still be on the way
        code = self._process.child.returncode
        self._die(EngineDeadError(f"the engine process ended with code {code}"))

    def _die(self, error: EngineDeadError) -> None:
        if self._dead is None:
            self._dead = error
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(self._dead)
        for stream in set(self._streams.values()):
            stream.open.clear()
            stream.deltas.put_nowait(self._dead)
        self._streams.clear()


def _refusal(refusal: Refused) -> OctavoError:
    """The exception behind a refusal, of its own class."""
    if refusal.kind == OverloadedError.__name__:
        return OverloadedError(refusal.message, retry_after_s=refusal.retry_after_s)
    kind = getattr(errors, refusal.kind, RequestError)
    error: RequestError = kind(refusal.message, param=refusal.param)
    return error


def _as_exception(fatal: Fatal) -> OctavoError:
    """The exception that stopped the engine's start, of its own class where it is one of ours."""
    kind = getattr(errors, fatal.kind, None)
    if isinstance(kind, type) and issubclass(kind, OctavoError):
        return kind(fatal.message)
    return EngineDeadError(f"the engine could not start: {fatal.kind}: {fatal.message}")
