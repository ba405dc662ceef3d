"""/tokenize and /detokenize, in vLLM's shapes. Knows no sampling.

The same bounds hold as for generation: no text longer than the context can be, no more ids than it.
"""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import check_prompt
from octavo.errors import ContextLengthError, RequestError
from octavo.server.body import decode, read_json
from octavo.server.errors import bad_request
from octavo.server.keys import Scope
from octavo.server.prompts import Prompt, PromptReader
from octavo.server.protocol import Message
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState
from octavo.text import Tokenizer


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


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
        return [
            Route("POST", "/tokenize", self.tokenize, Scope.INFERENCE, TokenizeRequest),
            Route("POST", "/detokenize", self.detokenize, Scope.INFERENCE, DetokenizeRequest),
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
            return await reader.chat(
                fields.messages, add_generation_prompt=fields.add_generation_prompt
            )
        raise bad_request("give either prompt or messages", param="prompt")

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
