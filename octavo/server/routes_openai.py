"""/v1/models, /v1/completions and /v1/chat/completions: from a body to a response that generates.

Each handler reads as the list of its steps; the steps are in the other modules.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from octavo.core import RequestOptions, SamplingParams, check_prompt
from octavo.server.answer_shape import names_of_shape
from octavo.server.body import read_json
from octavo.server.chat_style import ChatStyle
from octavo.server.errors import bad_request, name_fields
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.openai_chat import chat_shape
from octavo.server.openai_completions import CompletionShape
from octavo.server.prompts import Prompt, PromptReader, arguments_of_template, truncated
from octavo.server.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    parse_chat,
    parse_completion,
    sampling_params,
)
from octavo.server.replies import json_response
from octavo.server.response_shape import Shape, ShapeOptions
from octavo.server.state import EVENTS, JSON, Route, ServerState
from octavo.server.tools import OfferedTools, offered_tools

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class OpenAIRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """What the application serves."""
        user, media = Scope.INFERENCE, (JSON, EVENTS)
        return [
            Route("GET", "/v1/models", self.models, user),
            Route("GET", "/v1/models/{model:path}", self.model, user),
            Route("POST", "/v1/completions", self.completions, user, CompletionRequest, media),
            Route("POST", "/v1/chat/completions", self.chat_completions, user, ChatRequest, media),
        ]

    async def models(self, request: Request) -> Response:
        """All names of the one model, and those of its adapters."""
        cards = [self._card(name) for name in self._state.model_names]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One of these names."""
        return json_response(self._card(self._state.check_model(request.path_params["model"])))

    def _card(self, name: str) -> dict[str, object]:
        model, adapters = self._state.engine.model, self._state.engine.operations.adapters
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "root": name if name in adapters else model.name,
            "parent": model.name if name in adapters else None,
            "max_model_len": model.max_model_len,
        }

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        arrival_s = time.monotonic()
        state = self._state
        fields = parse_completion(await read_json(request, state.limits), state.limits)
        name = state.check_model(fields.model)
        name_fields(request, names_of_shape(fields.response_format, forced=False))
        num_echoed = fields.logprobs if fields.echo else None
        sampling = sampling_params(
            fields,
            state.limits,
            max_tokens=_or(fields.max_tokens, DEFAULT_COMPLETION_TOKENS),
            logprobs=fields.logprobs,
            prompt_logprobs=_most(fields.prompt_logprobs, num_echoed),
        )
        reader = PromptReader(state.engine.model, state.limits)
        prompts = await reader.completion(
            fields.prompt, add_special_tokens=_or(fields.add_special_tokens, True)
        )
        prompts = truncated(prompts, fields.truncate_prompt_tokens, room=_room(sampling, state))
        options = _shape_options(state, fields, prompts, sampling, model=name)
        echoes = [self._echo(prompt, sampling) for prompt in prompts] if fields.echo else None
        shape = CompletionShape(
            options, state.logprob_shaper, echoes=echoes, num_echo_logprobs=num_echoed
        )
        return _generate(request, state, shape, sampling, fields, arrival_s=arrival_s)

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
        tools = offered_tools(fields, state.limits)
        self._chat_style.check_tools(tools)
        name_fields(request, _chat_names(fields, tools))
        sampling = _chat_sampling(fields, state)
        definitions = None if tools is None else tools.definitions
        prompt = await reader.chat(
            fields.messages,
            add_generation_prompt=_or(fields.add_generation_prompt, True),
            continue_final_message=bool(fields.continue_final_message),
            template_arguments=arguments_of_template(
                fields.chat_template_kwargs, definitions, state.limits
            ),
        )
        sampling = self._chat_style.sampling(sampling, tools, prompt)
        prompts = truncated([prompt], fields.truncate_prompt_tokens, room=_room(sampling, state))
        options = _shape_options(state, fields, prompts, sampling, model=name)
        shape = chat_shape(
            options, state.logprob_shaper, self._chat_style.parsers(tools, prompts[0])
        )
        return _generate(request, state, shape, sampling, fields, arrival_s=arrival_s)

    @cached_property
    def _chat_style(self) -> ChatStyle:
        """Found at the first request: only then is the engine sure to know its tokenizer."""
        return ChatStyle.of(self._state.engine.model.tokenizer, self._state.config)


def _shape_options(
    state: ServerState,
    fields: CompletionRequest | ChatRequest,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    model: str,
) -> ShapeOptions:
    echoes = isinstance(fields, CompletionRequest) and bool(fields.echo)
    options = shape_options(
        state,
        prompts,
        sampling,
        model=model,
        return_token_ids=bool(fields.return_token_ids),
        include_usage=fields.include_usage,
        shows_prompt=echoes or fields.prompt_logprobs is not None,
    )
    return replace(options, num_prompt_logprobs=fields.prompt_logprobs)


def _generate(
    request: Request,
    state: ServerState,
    shape: Shape,
    sampling: SamplingParams,
    fields: SamplingFields,
    *,
    arrival_s: float,
) -> Response:
    options = RequestOptions(
        cache_salt=fields.cache_salt,
        priority=fields.priority,
        tenant=fields.tenant,
        deadline_ms=fields.deadline_ms,
    )
    stream = bool(fields.stream)
    return generate(
        request, state, shape, sampling, options=options, stream=stream, arrival_s=arrival_s
    )


def _room(sampling: SamplingParams, state: ServerState) -> int:
    """Tokens of a prompt that leave room for its answer."""
    return state.engine.model.max_model_len - _or(sampling.max_tokens, 1)


def _most(*numbers: int | None) -> int | None:
    """The largest of those that are given."""
    return max((number for number in numbers if number is not None), default=None)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _chat_sampling(fields: ChatRequest, state: ServerState) -> SamplingParams:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(
            "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens"
        )
    logprobs = _or(fields.top_logprobs, 0) if fields.logprobs else None
    return sampling_params(
        fields,
        state.limits,
        max_tokens=_or(new, old),
        logprobs=logprobs,
        prompt_logprobs=fields.prompt_logprobs,
    )


def _chat_names(fields: ChatRequest, tools: OfferedTools | None) -> dict[str, str]:
    """What chat calls fields that the core knows by other names."""
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    if fields.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    forced = tools is not None and tools.schema is not None
    return names | names_of_shape(fields.response_format, forced=forced)
