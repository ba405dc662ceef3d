"""`LLM`: the engine in the caller's process, for offline work. Knows no sockets and no HTTP."""

import gc
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
from tqdm import tqdm

from octavo.config import EngineOptions
from octavo.core import (
    NO_TOKENS,
    SCORE,
    Adapter,
    EngineStats,
    FinishReason,
    PoolingParams,
    PoolingType,
    Request,
    SamplingParams,
    SleepReport,
)
from octavo.engine.adapters import LoRARequest
from octavo.engine.answers import Answer, banned_by, check_request, check_shape, fan_out
from octavo.engine.build import BuiltEngine, PhaseListener, build_engine
from octavo.engine.interface import TextDelta
from octavo.engine.lora_requests import Asked, LoRARequests
from octavo.engine.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.engine.prompts import Conversation, EncodedPrompt, Prompt, PromptEncoder
from octavo.engine.scoring import cosine, matched
from octavo.engine.tasks import tasks_of
from octavo.errors import OctavoError, RequestError
from octavo.text import NoTokenizer, Tokenizer, load_tokenizer
from octavo.vision.prompts import ImageReader

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
        reader = ImageReader.of(self._engine.config.model)
        self._prompts = PromptEncoder(self._tokenizer, reader)
        self._loras = LoRARequests(self._engine.core.adapters, engine_options.lora.max_cpu_loras)
        self._ids = itertools.count()

    def close(self) -> None:
        """End the engine: its thread, and its hold on a KV file. Memory goes with the object."""
        self._engine.close()

    def sleep(self, level: int = 1) -> SleepReport:
        """Give up the KV cache's memory, and the weights', until `wake_up`. Asleep: only go deeper.

        Level 1 keeps weights in host memory (on a CPU, where they are); level 2 discards them, and
        they are read from the checkpoint again.

        Raises:
            OverloadedError: a stream is open.
            ConfigError: there is no such level.
        """
        return self._engine.core.sleep(level)

    def wake_up(self) -> None:
        """Be what it was before it slept, but for cached prefixes. Awake, nothing happens.

        Raises:
            ModelError: the weights cannot be read any more; it sleeps on, and may be asked again.
        """
        self._engine.core.wake_up()

    def expert_tokens(self) -> dict[str, list[int]]:
        """How many tokens each expert got: {layer: one number an expert}, since the start.

        Empty without `count_expert_tokens`, without experts, and while the engine sleeps.
        On a GPU, rows that fill a step up to the size of a CUDA graph count, too.
        """
        return self._engine.core.expert_tokens()

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
        lora_request: Asked = None,
    ) -> list[RequestOutput]:
        """Complete prompts; all run together. Outputs come in the order of the prompts.

        `lora_request` is the adapter of all of them, or one (or None) for each.

        Raises:
            RequestError: a prompt or its options are wrong; nothing has run then.
        """
        encode, some = self._prompts.encode, _as_list(prompts)
        return self._run(some, encode, sampling_params, use_tqdm, lora_request=lora_request)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Asked = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        first = messages[0] if messages else {}
        conversations = cast(
            Sequence[Conversation], [messages] if isinstance(first, Mapping) else messages
        )
        encode = self._prompts.encode_chat
        return self._run(
            conversations, encode, sampling_params, use_tqdm, lora_request=lora_request
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: PoolingType | None = None,
        *,
        normalize: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, float32, out of the hidden states after the final norm.

        `pooling` and `normalize` are those of `PoolingParams`; by default they are the model's own.

        Raises:
            RequestError: a prompt or an option is wrong; nothing has run then.
        """
        own = tasks_of(self._engine.config.model).embedding
        params = PoolingParams(
            pooling=pooling or own.pooling,
            normalize=own.normalize if normalize is None else normalize,
        )
        return self._pool(_as_list(prompts), self._prompts.encode, params, use_tqdm=use_tqdm)

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well each document fits the query, or its own one of as many queries.

        A cross-encoder reads both together; of other models it is the cosine of their vectors.

        Raises:
            RequestError: a text is wrong, or there are not as many; nothing has run then.
        """
        pairs = matched(*([t] if isinstance(t, str) else list(t) for t in (queries, documents)))
        tasks = tasks_of(self._engine.config.model)
        if tasks.num_classes:
            tasks.check_scores()
            found = self._pool(pairs, self._encode_pair, SCORE, use_tqdm=use_tqdm)
            scores = [float(one.outputs.embedding[0]) for one in found]
        else:
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            embedded = self.embed(texts, use_tqdm=use_tqdm)
            by_text = dict(zip(texts, embedded, strict=True))
            found = [by_text[document] for _, document in pairs]
            vectors = {text: one.outputs.embedding.tobytes() for text, one in by_text.items()}
            scores = [cosine(vectors[first], vectors[second]) for first, second in pairs]
        return [
            ScoringRequestOutput(one.request_id, ScoringOutput(score))
            for one, score in zip(found, scores, strict=True)
        ]

    def _pool(
        self,
        prompts: Sequence[P],
        encode: Callable[[P], EncodedPrompt],
        params: PoolingParams,
        *,
        use_tqdm: bool,
    ) -> list[EmbeddingRequestOutput]:
        batch = _Batch(self._engine, self._tokenizer)
        queued = self._queue(batch, prompts, encode, NO_TOKENS, pooling=params)
        outputs: dict[str, EmbeddingRequestOutput] = {}

        def take(request_id: str, delta: TextDelta) -> int:
            prompt = queued[request_id]
            outputs[request_id] = EmbeddingRequestOutput(
                request_id,
                prompt.text,
                prompt.token_ids,
                EmbeddingOutput(np.frombuffer(delta.vector, np.float32).copy()),
                delta.num_cached_tokens,
            )
            return 1

        batch.run(take, total=len(queued), use_tqdm=use_tqdm)
        return [outputs[request_id] for request_id in queued]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Complete one prompt piece by piece. Closing the iterator ends the request."""
        [adapter] = self._loras.adapters(lora_request, 1)
        encoded = self._prompts.encode(prompt).through(adapter)
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

    def _encode_pair(self, pair: tuple[str, str]) -> EncodedPrompt:
        model = self._engine.config.model
        tokens = self._tokenizer.encode_pair(*pair)
        return EncodedPrompt(tokens.with_types(model.vocab_size, max(1, model.num_token_types)))

    def _run(
        self,
        prompts: Sequence[P],
        encode: Callable[[P], EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        *,
        lora_request: Asked,
    ) -> list[RequestOutput]:
        batch = _Batch(self._engine, self._tokenizer)
        all_params = _one_each(sampling_params, len(prompts))
        adapters = self._loras.adapters(lora_request, len(prompts))
        queued = self._queue(batch, prompts, encode, all_params, adapters=adapters)
        outputs = {
            request_id: _empty_output(request_id, prompt, params)
            for (request_id, prompt), params in zip(queued.items(), all_params, strict=True)
        }
        batch.run(
            lambda request_id, delta: _extend(outputs[request_id], delta),
            total=len(queued),
            use_tqdm=use_tqdm,
        )
        return list(outputs.values())

    def _queue(
        self,
        batch: "_Batch",
        prompts: Sequence[P],
        encode: Callable[[P], EncodedPrompt],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        pooling: PoolingParams | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> dict[str, EncodedPrompt]:
        """Check all prompts, then queue them; return them by request id, in their order."""
        checked: list[tuple[str, EncodedPrompt, SamplingParams]] = []
        all_params, adapters = _one_each(sampling, len(prompts)), adapters or [None] * len(prompts)
        with _no_garbage_collection():
            for one, params, adapter in zip(prompts, all_params, adapters, strict=True):
                prompt = encode(one).through(adapter)
                batch.check(prompt, params, pooling)  # while its ids are in the CPU's cache
                checked.append((str(next(self._ids)), prompt, params))
            for request_id, prompt, params in checked:
                batch.add(request_id, prompt, params, pooling=pooling)
        return {request_id: prompt for request_id, prompt, _ in checked}


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

    def check(
        self, prompt: EncodedPrompt, sampling: SamplingParams, pooling: PoolingParams | None = None
    ) -> None:
        """Raise `RequestError` where the request could never run."""
        config = self._engine.config
        check_request(
            prompt.token_ids,
            sampling,
            vocab_size=config.model.vocab_size,
            max_model_len=config.max_model_len,
            has_text=not isinstance(self._tokenizer, NoTokenizer),
            tasks=tasks_of(config.model),
            pooling=pooling,
        )
        check_shape(sampling, config.model.eos_token_ids)

    def add(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        sampling: SamplingParams,
        *,
        pooling: PoolingParams | None = None,
    ) -> None:
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
            pooling=pooling,
            images=prompt.images,
        )
        requests = list(fan_out(template))
        self._engine.core.add(*requests)
        for index, request in enumerate(requests[: sampling.n]):
            answer = Answer(index, request, self._tokenizer)
            self.open[request.request_id] = request_id, answer

    def run(self, take: Callable[[str, TextDelta], int], *, total: int, use_tqdm: bool) -> None:
        """Run to the end; `take` gets what is new, and says how many requests it finished."""
        with tqdm(total=total, unit="prompt", disable=not use_tqdm) as progress:
            try:
                while self.open:
                    for request_id, delta in self.step():
                        progress.update(take(request_id, delta))
            finally:
                self.abort()

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


def _empty_output(
    request_id: str, prompt: EncodedPrompt, sampling: SamplingParams
) -> RequestOutput:
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
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = [None, *delta.prompt_logprobs]
    answer.token_ids += delta.token_ids
    if answer.logprobs is not None and delta.logprobs is not None:
        answer.logprobs += delta.logprobs
    if delta.finish_reason is None:
        return 0
    answer.finish_reason, answer.stop_reason = delta.finish_reason.value, delta.stop_reason
    output.finished = all(a.finish_reason is not None for a in output.outputs)
    return int(output.finished)
