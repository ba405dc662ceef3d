"""/v1/responses: OpenAI's Responses API, which keeps conversations and runs without a reader.

A response is a chat's answer in another form: all but the form, the store and the background is
what chat completions do. Knows no engine.
"""

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial

from starlette.requests import Request
from starlette.responses import Response

from octavo.core import RequestOptions, SamplingParams
from octavo.errors import OverloadedError
from octavo.server.body import read_json
from octavo.server.chat_parser import ChatParser
from octavo.server.chat_style import ChatStyle
from octavo.server.errors import ErrorReply, HttpError, bad_request, name_fields
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.prompts import Prompt, PromptReader, arguments_of_template
from octavo.server.protocol import ChatRequest, Message, sampling_params
from octavo.server.replies import json_response
from octavo.server.responses_protocol import (
    RUNNING,
    InputItem,
    ResponsesRequest,
    chat_request,
    input_items,
    messages_of,
    names_of_responses,
    parse_responses,
)
from octavo.server.responses_shape import AnswerReader, Document, ResponsesShape, settings_of
from octavo.server.responses_store import ResponseStore, StoredResponse
from octavo.server.responses_truncation import latest_turns
from octavo.server.state import EVENTS, JSON, Route, ServerState, key_of
from octavo.server.tools import OfferedTools, offered_tools


class ResponsesRoutes:
    """The handlers of one server, and its stored responses."""

    def __init__(self, state: ServerState):
        self._state = state
        self._store = ResponseStore(
            max_responses=state.limits.max_stored_responses,
            max_bytes=state.limits.max_stored_bytes,
        )

    def routes(self) -> list[Route]:
        """What the application serves."""
        user, media, one = Scope.INFERENCE, (JSON, EVENTS), "/v1/responses/{response_id}"
        return [
            Route("POST", "/v1/responses", self.create, user, ResponsesRequest, media),
            Route("GET", one, self.get, user),
            Route("DELETE", one, self.delete, user),
            Route("POST", f"{one}/cancel", self.cancel, user, queues=False),
        ]

    async def create(self, request: Request) -> Response:
        """Answer a conversation, and keep it."""
        arrival_s = time.monotonic()
        state = self._state
        fields = parse_responses(await read_json(request, state.limits), state.limits)
        name = state.check_model(fields.model)
        items = self._conversation(fields, _owner(request))
        with names_of_responses():
            chat = chat_request(fields)
            tools = offered_tools(chat, state.limits)
            self._chat_style.check_tools(tools)
            forced = tools is not None and tools.schema is not None
            name_fields(request, {"structured_outputs": "tools" if forced else "text.format"})
            sampling = self._sampling(chat)
            messages = messages_of(items, fields.instructions)
            prompt = await self._prompt(fields, messages, tools=tools, sampling=sampling)
            sampling = self._chat_style.sampling(sampling, tools, prompt)
            options = shape_options(state, [prompt], sampling, model=name)
        shape = ResponsesShape(
            options,
            state.logprob_shaper,
            settings=settings_of(fields, sampling),
            reader=self._reader(tools, prompt),
            keep=self._keeper(fields, _owner(request), items),
        )
        response = generate(
            request,
            state,
            shape,
            sampling,
            options=_options(fields),
            stream=bool(fields.stream or fields.background),
            arrival_s=arrival_s,
        )
        if fields.background:
            return self._run(request, response, shape, items)
        return response

    def _conversation(self, fields: ResponsesRequest, owner: str) -> list[InputItem]:
        """What came before, and what comes now."""
        items, previous_id = input_items(fields), fields.previous_response_id
        if previous_id is None:
            return items
        previous = self._store.find(previous_id, owner)
        if previous is None:
            raise bad_request(
                "the previous response is not stored here: it is not yours, was deleted, made way "
                "for others, or the server was restarted; send the whole conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        status = previous.document["status"]
        if status not in ("completed", "incomplete"):
            message = f"the previous response is {status}: only one that has ended can go on"
            raise bad_request(message, param="previous_response_id")
        return [*previous.conversation(), *items]

    def _sampling(self, chat: ChatRequest) -> SamplingParams:
        max_tokens, limits = chat.max_completion_tokens, self._state.limits
        return sampling_params(chat, limits, max_tokens=max_tokens, logprobs=None)

    async def _prompt(
        self,
        fields: ResponsesRequest,
        messages: Sequence[Message],
        *,
        tools: OfferedTools | None,
        sampling: SamplingParams,
    ) -> Prompt:
        state = self._state
        definitions = None if tools is None else tools.definitions
        kwargs = fields.chat_template_kwargs
        read = partial(
            PromptReader(state.engine.model, state.limits).chat,
            add_generation_prompt=True,
            template_arguments=arguments_of_template(kwargs, definitions, state.limits),
        )
        if fields.truncation != "auto":
            return await read(messages)
        room = state.engine.model.max_model_len - (sampling.max_tokens or 1)
        return await latest_turns(messages, read, max_tokens=room)

    def _reader(self, tools: OfferedTools | None, prompt: Prompt) -> AnswerReader:
        new_parser = self._chat_style.parsers(tools, prompt) or ChatParser
        encode = self._state.engine.model.tokenizer.encode

        def count_tokens(text: str) -> int:
            return len(encode(text, add_special_tokens=False))

        return AnswerReader(parser=new_parser(), count_tokens=count_tokens)

    @cached_property
    def _chat_style(self) -> ChatStyle:
        """Found at the first request: only then is the engine sure to know its tokenizer."""
        return ChatStyle.of(self._state.engine.model.tokenizer, self._state.config)

    def _keeper(
        self, fields: ResponsesRequest, owner: str, items: list[InputItem]
    ) -> Callable[[Document], None]:
        """What becomes of a response whenever its status changes.

        One with a reader is stored at its end: if the reader goes away, there is none.
        """

        def keep(document: Document) -> None:
            if fields.background:
                self._store.update(document["id"], document)
            elif fields.is_stored and document["status"] not in RUNNING:
                self._store.keep(StoredResponse(document, owner, items))

        return keep

    def _run(
        self, request: Request, response: Response, shape: ResponsesShape, items: list[InputItem]
    ) -> Response:
        """Start a response that nobody reads, and say under which id to ask for it."""
        max_running = self._state.limits.max_stored_responses
        if len(self._state.background) >= max_running:
            message = f"{max_running} responses run in the background"
            raise OverloadedError(message, retry_after_s=1.0)
        document = shape.document()
        self._store.keep(StoredResponse(document, _owner(request), items))
        self._state.background.start(response, shape, request.scope)
        return json_response(document)

    async def get(self, request: Request) -> Response:
        """A stored response, as it is now."""
        if request.query_params.get("stream", "false") not in ("false", "0", ""):
            message = "stream is not supported here: ask again until the status has changed"
            raise bad_request(message, param="stream", code="unsupported_parameter")
        return json_response(self._find(request).document)

    async def cancel(self, request: Request) -> Response:
        """End a background response; of no effect on one that has ended."""
        stored = self._find(request)
        if not stored.document["background"]:
            message = "only responses that run in the background can be cancelled"
            raise bad_request(message, param="response_id")
        await self._state.background.cancel(stored.id)
        return json_response(stored.document)

    async def delete(self, request: Request) -> Response:
        """Forget a response, and end it where it runs."""
        stored = self._find(request)
        await self._state.background.cancel(stored.id)
        self._store.delete(stored.id)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    def _find(self, request: Request) -> StoredResponse:
        stored = self._store.find(request.path_params["response_id"], _owner(request))
        if stored is None:
            message = "no stored response has this id"
            raise HttpError(ErrorReply(404, message, "invalid_request_error", "response_id"))
        return stored


def _owner(request: Request) -> str:
    """Whose responses a request may see: its tenant's, or its key's own where it has none."""
    key = key_of(request)
    if key is None:
        return ""
    tenant = key.entry.tenant
    return f"key {key.entry.name}" if tenant is None else f"tenant {tenant}"


def _options(fields: ResponsesRequest) -> RequestOptions:
    return RequestOptions(
        cache_salt=fields.cache_salt,
        priority=fields.priority,
        tenant=fields.tenant,
        deadline_ms=fields.deadline_ms,
    )
