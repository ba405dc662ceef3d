"""`LLM`: the engine in the caller's process, for offline work. Knows no sockets and no HTTP."""

import gc
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from tqdm import tqdm

from octavo.config import EngineOptions
from octavo.core import EngineStats, FinishReason, Request, RequestOptions, SamplingParams
from octavo.engine.answers import Answer, banned_by, check_request, check_shape, fan_out
from octavo.engine.build import BuiltEngine, PhaseListener, build_engine
from octavo.engine.interface import DEFAULT_OPTIONS, TextDelta
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.errors import OctavoError, RequestError
from octavo.text import NoTokenizer, Tokenizer, load_tokenizer

# Text, token ids, or a mapping with "prompt" or "prompt_token_ids", and perhaps "cache_salt".
Prompt = str | Sequence[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]
P = TypeVar("P")


class LLM:
    """A model, ready to answer.

    >>> llm = LLM("smollm2-135m-instruct")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    `model` is an alias, a local Hugging Face directory, a .gguf file or a hub id. Further keywords
    are the fields of `octavo.config`'s option classes, which `octavo serve --help` explains.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or not with these options.
    """

    def __init__(
        self,
        model: str,
        *,
        on_phase: PhaseListener = lambda phase, seconds: None,
        check_integrity: bool = False,
        **options: Any,
    ):
        engine_options = EngineOptions.from_flat(model, options)
        self._engine: BuiltEngine = build_engine(
            engine_options, on_phase=on_phase, check_integrity=check_integrity
        )
        self._tokenizer: Tokenizer = (
            NoTokenizer()
            if engine_options.loading.skip_tokenizer_init
            else load_tokenizer(self._engine.checkpoint)
        )
        self._ids = itertools.count()

    def close(self) -> None:
        """End the engine: its thread, and its hold on a KV file. Memory goes with the object."""
        self._engine.close()

    @property
    def engine(self) -> BuiltEngine:
        """The engine core, its resolved configuration and the kernels that layers got."""
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def stats(self) -> EngineStats:
        """The engine's gauges and counters."""
        return self._engine.core.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; all run together. Outputs come in the order of the prompts.

        Raises:
            RequestError: a prompt or its options are wrong; nothing has run then.
        """
        return self._run(_as_list(prompts), self._encode, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        first = messages[0] if messages else {}
        conversations = cast(
            Sequence[Conversation], [messages] if isinstance(first, Mapping) else messages
        )
        return self._run(conversations, self._encode_chat, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Complete one prompt piece by piece. Closing the iterator ends the request."""
        encoded = self._encode(prompt)
        batch = _Batch(self._engine, self._tokenizer)
        try:
            sampling = sampling_params or SamplingParams()
            batch.check(encoded, sampling)
            batch.add(str(next(self._ids)), encoded, sampling)
            while batch.open:
                for _, delta in batch.step():
                    yield delta
        finally:
            batch.abort()

    def _encode(self, prompt: Prompt) -> "_Prompt":
        if isinstance(prompt, str):
            return _Prompt(self._tokenizer.encode(prompt), prompt)
        if not isinstance(prompt, Mapping):
            return _Prompt(list(prompt))
        options = RequestOptions(cache_salt=prompt.get("cache_salt"))
        if "prompt_token_ids" in prompt:
            return _Prompt(list(prompt["prompt_token_ids"]), None, options)
        if "prompt" not in prompt:
            raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'", param="prompt")
        text = str(prompt["prompt"])
        return _Prompt(self._tokenizer.encode(text), text, options)

    def _encode_chat(self, messages: Conversation) -> "_Prompt":
        return _Prompt(self._tokenizer.encode_chat(messages))

    def _run(
        self,
        prompts: Sequence[P],
        encode: "Callable[[P], _Prompt]",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        batch = _Batch(self._engine, self._tokenizer)
        checked = []
        outputs: dict[str, RequestOutput] = {}
        with _no_garbage_collection():
            for one, params in zip(prompts, _one_each(sampling_params, len(prompts)), strict=True):
                prompt = encode(one)
                batch.check(prompt, params)  # while its ids are in the CPU's cache
                checked.append((str(next(self._ids)), prompt, params))
            for request_id, prompt, params in checked:
                outputs[request_id] = _empty_output(request_id, prompt, params)
                batch.add(request_id, prompt, params)
        with tqdm(total=len(prompts), unit="prompt", disable=not use_tqdm) as progress:
            try:
                while batch.open:
                    for request_id, delta in batch.step():
                        progress.update(_extend(outputs[request_id], delta))
            finally:
                batch.abort()
        return list(outputs.values())


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as the engine takes it, and the text where the user gave one."""

    token_ids: list[int]
    text: str | None = None
    options: RequestOptions = DEFAULT_OPTIONS


class _Batch:
    """Requests on their way through an in-process engine."""

    def __init__(self, engine: BuiltEngine, tokenizer: Tokenizer):
        if engine.core.has_work:
            raise OctavoError(
                "this LLM is still streaming another answer: finish or close that one"
            )
        self._engine = engine
        self._tokenizer = tokenizer
        self.open: dict[str, tuple[str, Answer]] = {}  # engine request id -> user's id, answer

    def check(self, prompt: _Prompt, sampling: SamplingParams) -> None:
        """Raise `RequestError` where the request could never run."""
        config = self._engine.config
        check_request(
            prompt.token_ids,
            sampling,
            vocab_size=config.model.vocab_size,
            max_model_len=config.max_model_len,
            has_text=not isinstance(self._tokenizer, NoTokenizer),
        )
        check_shape(sampling, config.model.eos_token_ids)

    def add(self, request_id: str, prompt: _Prompt, sampling: SamplingParams) -> None:
        """Queue the `n` answers to a prompt that was checked."""
        model = self._engine.config.model
        template = Request(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            seed=0,
            eos_token_ids=model.eos_token_ids,
            options=prompt.options,
            banned=banned_by(sampling, self._tokenizer, vocab_size=model.vocab_size),
        )
        requests = list(fan_out(template))
        self._engine.core.add(*requests)
        for index, request in enumerate(requests[: sampling.n]):
            answer = Answer(index, request, self._tokenizer)
            self.open[request.request_id] = request_id, answer

    def step(self) -> list[tuple[str, TextDelta]]:
        """Run one step of the engine; return (the user's request id, what is new) for each."""
        deltas, stopped = [], []
        for event in self._engine.core.step():
            if event.request_id not in self.open:
                continue  # a beam that is none of the best
            request_id, answer = self.open[event.request_id]
            delta = answer.update(event)
            if delta.finish_reason is not None:
                del self.open[event.request_id]
                if event.finish_reason is None:  # a stop string: the engine does not know yet
                    stopped.append(event.request_id)
            deltas.append((request_id, delta))
        self._engine.core.abort(stopped)
        for request_id, delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise OctavoError(f"request {request_id} failed: {delta.error}")
        return deltas

    def abort(self) -> None:
        """End whatever is still running."""
        self._engine.core.abort(list(self.open))
        self.open.clear()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For a short while: lists of token ids are looked through anew in each collection."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"{count} prompts but {len(sampling)} sampling parameters", param="sampling_params"
        )
    return list(sampling)


def _empty_output(request_id: str, prompt: _Prompt, sampling: SamplingParams) -> RequestOutput:
    answers = [
        CompletionOutput(index, logprobs=None if sampling.logprobs is None else [])
        for index in range(sampling.n)
    ]
    return RequestOutput(request_id, prompt.text, prompt.token_ids, answers)


def _extend(output: RequestOutput, delta: TextDelta) -> int:
    """Add a delta to its answer; return 1 where that finished the whole request, else 0."""
    answer = output.outputs[delta.index]
    answer.text += delta.text
    output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
    answer.token_ids += delta.token_ids
    if answer.logprobs is not None and delta.logprobs is not None:
        answer.logprobs += delta.logprobs
    if delta.finish_reason is None:
        return 0
    answer.finish_reason, answer.stop_reason = delta.finish_reason.value, delta.stop_reason
    output.finished = all(a.finish_reason is not None for a in output.outputs)
    return int(output.finished)
