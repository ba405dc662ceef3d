"""/tokenize and /detokenize, in vLLM's shapes. Knows no sampling.

A conversation becomes the very ids that chat completions would make of it.

The same bounds hold as for generation: no text longer than the context can be, no more ids than it.
"""

import asyncio
from functools import cached_property
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import check_prompt
from octavo.errors import ContextLengthError, RequestError
from octavo.server.body import decode, read_json
from octavo.server.chat_style import ChatStyle
from octavo.server.errors import bad_request
from octavo.server.keys import Scope
from octavo.server.prompts import Prompt, PromptReader, arguments_of_template
from octavo.server.protocol import Message, Tool
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState
from octavo.server.tools import definitions_of
from octavo.text import Tokenizer


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Exactly one of `prompt` and `messages`; what is below `return_token_strs` is of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids to be read as text."""

    model: str | None = None
    tokens: list[int]


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


class TokenizeRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        user = Scope.INFERENCE
        return [
            Route("POST", "/tokenize", self.tokenize, user, TokenizeRequest, queues=False),
            Route("POST", "/detokenize", self.detokenize, user, DetokenizeRequest, queues=False),
        ]

    async def tokenize(self, request: Request) -> Response:
        """Text or a conversation as token ids."""
        fields = decode(await read_json(request, self._state.limits), _TOKENIZE)
        self._state.check_model(fields.model)
        model = self._state.engine.model
        prompt = await self._prompt(fields)
        strings = None
        if fields.return_token_strs:
            strings = await asyncio.to_thread(_strings, prompt.token_ids, model.tokenizer)
        return json_response(
            {
                "count": len(prompt.token_ids),
                "max_model_len": model.max_model_len,
                "tokens": prompt.token_ids,
                "token_strs": strings,
            }
        )

    async def _prompt(self, fields: TokenizeRequest) -> Prompt:
        reader = PromptReader(self._state.engine.model, self._state.limits)
        if fields.prompt is not None and fields.messages is None:
            prompts = await reader.completion(
                fields.prompt, add_special_tokens=fields.add_special_tokens
            )
            return prompts[0]
        if fields.messages is not None and fields.prompt is None:
            tools = definitions_of(fields.tools or [], self._state.limits) or None
            if tools:
                self._chat_style.check_tools(tools)
            return await reader.chat(
                fields.messages,
                add_generation_prompt=fields.add_generation_prompt,
                continue_final_message=fields.continue_final_message,
                template_arguments=arguments_of_template(
                    fields.chat_template_kwargs, tools, self._state.limits
                ),
            )
        raise bad_request("give either prompt or messages", param="prompt")

    @cached_property
    def _chat_style(self) -> ChatStyle:
        """Found at the first request: only then is the engine sure to know its tokenizer."""
        return ChatStyle.of(self._state.engine.model.tokenizer, self._state.config)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text, special tokens included."""
        fields = decode(await read_json(request, self._state.limits), _DETOKENIZE)
        self._state.check_model(fields.model)
        model = self._state.engine.model
        if len(fields.tokens) > model.max_model_len:
            raise ContextLengthError(
                f"{len(fields.tokens)} tokens are more than the context of {model.max_model_len}",
                param="tokens",
            )
        try:
            check_prompt(fields.tokens or [0], vocab_size=model.vocab_size)
        except RequestError as error:
            raise RequestError(str(error), param="tokens") from None
        decode_ids = model.tokenizer.decode
        text = await asyncio.to_thread(decode_ids, fields.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})


def _strings(token_ids: list[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in token_ids]
