"""/v1/models, /v1/completions and /v1/chat/completions: from a body to a response that generates.

Each handler reads as the list of its steps; the steps are in the other modules.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from octavo.core import RequestOptions, SamplingParams, check_prompt, resolve_max_tokens
from octavo.errors import RequestError
from octavo.server.answers import Answers
from octavo.server.body import read_json
from octavo.server.errors import bad_request
from octavo.server.generation_response import GenerationResponse
from octavo.server.openai_chat import ChatShape
from octavo.server.openai_completions import CompletionShape
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.openai_shape import Shape, ShapeOptions
from octavo.server.prompts import Prompt, PromptReader
from octavo.server.protocol import (
    ChatRequest,
    SamplingFields,
    parse_chat,
    parse_completion,
    sampling_params,
)
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class OpenAIRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state
        self._created = int(time.time())
        self._shaper: LogprobShaper | None = None

    def routes(self) -> list[Route]:
        """What the application serves."""
        return [
            Route("GET", "/v1/models", self.models),
            Route("GET", "/v1/models/{model:path}", self.model),
            Route("POST", "/v1/completions", self.completions),
            Route("POST", "/v1/chat/completions", self.chat_completions),
        ]

    async def models(self, request: Request) -> Response:
        """All names of the one model."""
        cards = [self._card(name) for name in self._state.model_names]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One name of the one model."""
        return json_response(self._card(self._state.check_model(request.path_params["model"])))

    def _card(self, name: str) -> dict[str, object]:
        model = self._state.engine.model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        arrival_s = time.monotonic()
        state = self._state
        fields = parse_completion(await read_json(request, state.limits), state.limits)
        name = state.check_model(fields.model)
        sampling = sampling_params(
            fields,
            state.limits,
            max_tokens=_or(fields.max_tokens, DEFAULT_COMPLETION_TOKENS),
            logprobs=fields.logprobs,
        )
        reader = PromptReader(state.engine.model, state.limits)
        prompts = await reader.completion(
            fields.prompt, add_special_tokens=_or(fields.add_special_tokens, True)
        )
        options = self._options(fields, prompts, sampling, model=name)
        echoes = [self._echo(prompt, sampling) for prompt in prompts] if fields.echo else None
        shape = CompletionShape(options, self._logprob_shaper(), echoes=echoes)
        return self._response(shape, sampling, fields, arrival_s=arrival_s)

    def _echo(self, prompt: Prompt, sampling: SamplingParams) -> str:
        if prompt.text is not None:
            return prompt.text
        model = self._state.engine.model
        check_prompt(prompt.token_ids, vocab_size=model.vocab_size)
        skip = sampling.skip_special_tokens
        return model.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        arrival_s = time.monotonic()
        state = self._state
        fields = parse_chat(await read_json(request, state.limits), state.limits)
        name = state.check_model(fields.model)
        reader = PromptReader(state.engine.model, state.limits)
        with _chat_names(fields):
            sampling = _chat_sampling(fields, state)
            prompt = await reader.chat(
                fields.messages, add_generation_prompt=_or(fields.add_generation_prompt, True)
            )
            options = self._options(fields, [prompt], sampling, model=name)
        shape = ChatShape(options, self._logprob_shaper())
        return self._response(shape, sampling, fields, arrival_s=arrival_s)

    def _options(
        self,
        fields: SamplingFields,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        model: str,
    ) -> ShapeOptions:
        limits = self._state.limits
        if len(prompts) * sampling.n > limits.max_choices:
            message = f"prompts times n must be at most {limits.max_choices}"
            raise bad_request(message, param="n")
        served = self._state.engine.model
        if sampling.logprobs is not None and not served.has_text:
            message = "logprobs spell tokens, and no tokenizer is loaded (skip_tokenizer_init)"
            raise bad_request(message, param="logprobs")
        for prompt in prompts:
            resolve_max_tokens(len(prompt.token_ids), sampling.max_tokens, served.max_model_len)
        return ShapeOptions(
            model=model,
            prompts=prompts,
            num_per_prompt=sampling.n,
            with_logprobs=sampling.logprobs is not None,
            return_token_ids=bool(fields.return_token_ids),
            include_usage=fields.include_usage,
            has_text=served.has_text,
        )

    def _logprob_shaper(self) -> LogprobShaper:
        """Made at the first request: only then is the engine sure to know its tokenizer."""
        if self._shaper is None:
            self._shaper = LogprobShaper(self._state.engine.model.tokenizer)
        return self._shaper

    def _response(
        self, shape: Shape, sampling: SamplingParams, fields: SamplingFields, *, arrival_s: float
    ) -> Response:
        answers = Answers(
            self._state.engine,
            shape.options.prompts,
            sampling,
            options=RequestOptions(
                cache_salt=fields.cache_salt,
                priority=fields.priority,
                tenant=fields.tenant,
                deadline_ms=fields.deadline_ms,
            ),
            response_id=shape.id,
            metrics=self._state.metrics,
            arrival_s=arrival_s,
            max_unread_deltas=self._state.limits.max_unread_deltas,
        )
        return GenerationResponse(answers, shape, stream=bool(fields.stream))


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _chat_sampling(fields: ChatRequest, state: ServerState) -> SamplingParams:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(
            "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens"
        )
    logprobs = _or(fields.top_logprobs, 0) if fields.logprobs else None
    return sampling_params(fields, state.limits, max_tokens=_or(new, old), logprobs=logprobs)


@contextmanager
def _chat_names(fields: ChatRequest) -> Iterator[None]:
    """Let errors name the fields of chat, where the core knows them by other names."""
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    if fields.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except RequestError as error:
        if error.param in names:
            message = str(error)
            if message.startswith(error.param):
                message = names[error.param] + message.removeprefix(error.param)
            error.args = (message,)
            error.param = names[error.param]
        raise
