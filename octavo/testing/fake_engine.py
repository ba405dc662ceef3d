"""A `ServingEngine` without a model: deterministic text, delays and faults on demand.

Keeps books (live, aborted and finished requests) so that tests can see that nothing leaks. Runs on
the caller's event loop. Knows no HTTP.
"""

import asyncio
import codecs
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace

from octavo.core import (
    NO_IMAGES,
    Adapter,
    EngineStats,
    FinishReason,
    ModelTasks,
    PoolingParams,
    RequestOptions,
    RequestStatus,
    SamplingParams,
    SeenImages,
    SleepReport,
    TokenLogprobs,
    check_prompt,
    check_sampling_ids,
    resolve_max_tokens,
)
from octavo.engine import Pulse, Rest, ServedModel, TextDelta
from octavo.engine.answers import check_shape
from octavo.engine.interface import DEFAULT_OPTIONS
from octavo.errors import (
    EngineDeadError,
    OctavoError,
    OverloadedError,
    RequestError,
    UnknownModelError,
)
from octavo.testing.byte_tokenizer import EOS, ByteTokenizer

NUM_BLOCKS = 1000
_TOKENS_PER_BLOCK = 16


def echo_reply(prompt: str, index: int) -> str:
    """The default answer: says the prompt again, and which of the `n` answers this is."""
    return f"Answer {index} to: {prompt}"


def fake_vector(token_ids: list[int]) -> bytes:
    """The vector of a prompt: how long it is, and its first and its last token."""
    return array("f", (len(token_ids), token_ids[0], token_ids[-1])).tobytes()


def fake_score(token_ids: list[int]) -> bytes:
    """The score of a pair: how long it is."""
    return array("f", [len(token_ids)]).tobytes()


@dataclass(kw_only=True)
class FakeScript:
    """How a fake engine behaves. May be changed while it runs."""

    reply: Callable[[str, int], str] = echo_reply
    queue_delay_s: float = 0.0  # before the first token
    token_delay_s: float = 0.0  # before every further one
    max_requests: int | None = None  # one more is refused as an overload
    dead: bool = False
    cpu_s: float = 0.0  # that its process has used
    fail_after: int | None = None  # tokens of an answer, after which comes `failure`
    rest_delay_s: float = 0.0  # to fall asleep, and to wake up
    cannot_wake: str = ""  # why it will not wake up
    failure: BaseException | str = (
        "the fake engine failed as told"  # a string ends one answer with it
    )


@dataclass
class FakeEngine:
    """Answers a prompt with `script.reply`, one byte a token."""

    script: FakeScript = field(default_factory=FakeScript)
    name: str = "fake-model"
    max_model_len: int = 4096
    tasks: ModelTasks = ModelTasks()
    received: dict[str, tuple[list[int], SamplingParams]] = field(default_factory=dict)
    seen: dict[str, SeenImages] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_resets: int = 0
    num_expert_tokens: dict[str, list[int]] = field(default_factory=dict)  # by layer
    num_generation_tokens: int = 0
    adapters: dict[str, Adapter] = field(default_factory=dict)
    asked_of: dict[str, Adapter | None] = field(default_factory=dict)  # by request
    num_sleeps: int = 0
    abandoned: str = ""  # why it was given up

    def __post_init__(self) -> None:
        tokenizer = ByteTokenizer()
        self.model = ServedModel(
            self.name, self.max_model_len, tokenizer.vocab_size, tokenizer, self.tasks
        )
        self._to_end: set[str] = set()  # requests that are to end at their next token
        self.rest = Rest(
            is_idle=lambda: not self.is_busy,
            abort_all=lambda: self._to_end.update(self.live),
            sleep=self._sleep,
            wake_up=self._wake_up,
        )

    def check_health(self) -> None:
        """Raise `EngineDeadError` where the script says so."""
        if self.script.dead:
            raise EngineDeadError(self.abandoned or "the fake engine is dead: /fake/path.py line 1")

    @property
    def is_busy(self) -> bool:
        """While a request lives."""
        return bool(self.live)

    def examine(self) -> Pulse:
        """A process like any other."""
        return Pulse("computes", self.script.cpu_s)

    def abandon(self, reason: str) -> None:
        """Dead from now on, whatever the script says."""
        self.abandoned = reason
        self.script.dead = True

    @property
    def operations(self) -> "FakeEngine":
        """Operators ask the engine itself."""
        return self

    async def why(self, request_id: str) -> dict[str, list[str]]:
        """A story for each live request whose id begins with this."""
        return {name: ["running"] for name in self.live if name.startswith(request_id)}

    async def requests(self) -> list[RequestStatus]:
        """One for each live request."""
        return [
            RequestStatus(name, "running", "running", 0.5, len(ids), len(ids), 1, 0, 0, "")
            for name, (ids, _) in self.received.items()
            if name in self.live
        ]

    async def _sleep(self, level: int) -> SleepReport:
        self.num_sleeps += 1
        await asyncio.sleep(self.script.rest_delay_s)
        self.check_health()
        weight_bytes = 2**20 if level == 2 else 0
        return SleepReport(level, 2**21, weight_bytes, 0, 2**21 + weight_bytes, 0.5)

    async def _wake_up(self) -> None:
        await asyncio.sleep(self.script.rest_delay_s)
        if self.script.cannot_wake:
            raise OctavoError(self.script.cannot_wake)

    async def expert_tokens(self) -> dict[str, list[int]]:
        """Those that a test put there."""
        return self.num_expert_tokens

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> Adapter:
        """Any path will do."""
        if name in self.adapters and not replace:
            raise RequestError("the fake adapter is loaded already", param="lora_name")
        self.adapters[name] = Adapter(name, path)
        return self.adapters[name]

    async def unload_adapter(self, name: str) -> Adapter:
        """One that was loaded."""
        if name not in self.adapters:
            raise UnknownModelError("no fake adapter of that name", param="lora_name")
        return self.adapters.pop(name)

    async def reset_prefix_cache(self) -> None:
        """Counts how often."""
        self.num_resets += 1

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        """One that somebody gave."""
        return [("max_num_seqs", "7", "flag", "")]

    def stats(self) -> EngineStats:
        """Every live request runs, on as many blocks as its prompt needs."""
        num_used = sum(len(self.received[i][0]) // _TOKENS_PER_BLOCK + 1 for i in self.live)
        return EngineStats(
            num_running=len(self.live),
            num_waiting=0,
            num_free_blocks=NUM_BLOCKS - num_used,
            num_blocks=NUM_BLOCKS,
            num_preemptions=0,
            num_steps=self.num_generation_tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
        )

    def check_room(self, num_sequences: int = 1) -> None:
        """As many requests as the script says; it does not count their answers."""
        if self.script.max_requests is not None and len(self.live) >= self.script.max_requests:
            raise OverloadedError("the fake queue is full", retry_after_s=2.0)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
        *,
        pooling: PoolingParams | None = None,
        images: SeenImages = NO_IMAGES,
    ) -> AsyncGenerator[TextDelta, None]:
        """The answers of one request, interleaved; of a pooling one, its vector."""
        self.seen[request_id] = images
        self.asked_of[request_id] = options.adapter
        max_tokens = self._admit(request_id, prompt_token_ids, sampling, pooling)
        without_types = [token_id % self.model.vocab_size for token_id in prompt_token_ids]
        prompt = self.model.tokenizer.decode(without_types)
        answers = [
            _Answer(index, self.script.reply(prompt, index), sampling, max_tokens=max_tokens)
            for index in range(sampling.n)
        ]
        try:
            await asyncio.sleep(self.script.queue_delay_s)
            self.num_prompt_tokens += len(prompt_token_ids)
            while answers:
                for answer in list(answers):
                    delta = self._next(request_id, answer)
                    if answer.num_tokens < 2 and delta.finish_reason is not FinishReason.ERROR:
                        delta = _with_prompt(delta, prompt_token_ids, sampling, pooling)
                    if delta.finish_reason is not None:
                        answers.remove(answer)
                    yield delta
                await asyncio.sleep(self.script.token_delay_s)
            self.finished.append(request_id)
        finally:
            self.live.remove(request_id)
            self._to_end.discard(request_id)
            if answers:
                self.aborted.append(request_id)

    def _admit(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        pooling: PoolingParams | None,
    ) -> int:
        self.check_health()
        self.tasks.check(pooling)
        self.rest.check_awake()
        self.check_room()
        max_tokens = resolve_max_tokens(len(token_ids), sampling.max_tokens, self.max_model_len)
        num_types = self.tasks.num_token_types if pooling and pooling.uses_head else 1
        check_prompt(token_ids, vocab_size=num_types * self.model.vocab_size)
        check_sampling_ids(sampling, vocab_size=self.model.vocab_size)
        check_shape(sampling, self.model.tokenizer.eos_token_ids)
        self.received[request_id] = token_ids, sampling
        self.live.add(request_id)
        return max_tokens

    def _next(self, request_id: str, answer: "_Answer") -> TextDelta:
        self.check_health()
        if request_id in self._to_end:
            return TextDelta(answer.index, "", finish_reason=FinishReason.ABORT)
        if answer.num_tokens == self.script.fail_after:
            if isinstance(self.script.failure, BaseException):
                raise self.script.failure
            error = self.script.failure
            return TextDelta(answer.index, "", finish_reason=FinishReason.ERROR, error=error)
        self.num_generation_tokens += 1
        delta = next(answer.deltas)
        if answer.num_tokens == 1:
            delta = replace(delta, queue_time_s=self.script.queue_delay_s)
        return delta


class _Answer:
    """One answer, cut into deltas of one token each."""

    def __init__(self, index: int, reply: str, sampling: SamplingParams, *, max_tokens: int):
        self.index = index
        self.num_tokens = 0
        self.deltas = self._run(reply, sampling, max_tokens)

    def _run(self, reply: str, sampling: SamplingParams, max_tokens: int) -> Iterator[TextDelta]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        num_held_back = max((len(stop) for stop in sampling.stop_strings), default=1) - 1
        text, num_sent = "", 0
        if max_tokens == 0:
            yield TextDelta(self.index, "", finish_reason=FinishReason.LENGTH)
            return
        for token_id in self._ids(reply, sampling):
            self.num_tokens += 1
            finish: FinishReason | None = None
            stop_reason: str | int | None = None
            if token_id in ({EOS} | set(sampling.stop_token_ids or ())) and not (
                token_id == EOS and sampling.ignore_eos
            ):
                finish = FinishReason.STOP
                stop_reason = None if token_id == EOS else token_id
            else:
                text += decoder.decode(bytes((token_id,))) if token_id < 256 else ""
            if finish is None and self.num_tokens == max_tokens:
                finish = FinishReason.LENGTH
            found = _first_stop(text, sampling)
            if found is not None:
                text, stop_reason, finish = *found, FinishReason.STOP
            end = len(text) if finish else max(num_sent, len(text) - num_held_back)
            piece, num_sent = text[num_sent:end], end
            logprobs = (
                (_logprobs(token_id, sampling.logprobs),) if sampling.logprobs is not None else None
            )
            yield TextDelta(self.index, piece, (token_id,), logprobs, finish, stop_reason)
            if finish:
                return

    def _ids(self, reply: str, sampling: SamplingParams) -> Iterator[int]:
        while True:
            yield from reply.encode()
            if not sampling.ignore_eos:
                yield EOS


def _with_prompt(
    delta: TextDelta, token_ids: list[int], sampling: SamplingParams, pooling: PoolingParams | None
) -> TextDelta:
    """An answer's first delta, with what is told of the prompt."""
    if pooling is not None:
        made = fake_score(token_ids) if pooling.uses_head else fake_vector(token_ids)
        return replace(delta, finish_reason=FinishReason.STOP, vector=made)
    if sampling.prompt_logprobs is None or delta.index:
        return delta
    scores = tuple(_logprobs(token_id, sampling.prompt_logprobs) for token_id in token_ids[1:])
    return replace(delta, prompt_logprobs=scores)


def _first_stop(text: str, sampling: SamplingParams) -> tuple[str, str] | None:
    """The text cut at the stop string that comes first, and that string."""
    found = [(text.find(stop), stop) for stop in sampling.stop_strings if stop in text]
    if not found:
        return None
    at, stop = min(found)
    return text[: at + len(stop) * sampling.include_stop_str_in_output], stop


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    top = tuple(((token_id + i) % 256, -0.25 - i) for i in range(num_top))
    return TokenLogprobs(-0.25, 1, top)
