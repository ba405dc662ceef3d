"""/v1/embeddings, in OpenAI's shape with vLLM's extensions: prompts in, vectors out.

The way to the engine is that of generation, with its bounds and its books; nothing is generated.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import NO_TOKENS, PoolingParams, PoolingType, RequestOptions, check_prompt
from octavo.errors import RequestError
from octavo.server.body import decode, read_json
from octavo.server.embedding_shape import EmbeddingShape, EncodingFormat
from octavo.server.errors import bad_request
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.limits import Limits
from octavo.server.prompts import PromptReader, fitted
from octavo.server.protocol import PromptField, Refusals
from octavo.server.state import Route, ServerState


class SchedulingFields(msgspec.Struct, kw_only=True):
    """How a request wants to be treated: see `RequestOptions`."""

    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""
    deadline_ms: int | None = None


class EmbeddingRequest(SchedulingFields, kw_only=True):
    """POST /v1/embeddings. Without `pooling`, the server's own (`--pooling`) holds."""

    input: PromptField
    model: str | None = None
    encoding_format: EncodingFormat | None = None
    dimensions: int | None = None
    pooling: PoolingType | None = None
    normalize: bool | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None


_EMBEDDING = msgspec.json.Decoder(EmbeddingRequest)
_REFUSALS = Refusals(EmbeddingRequest, {"messages": ([],), "input_type": ()})


def parse_embedding(body: bytes, limits: Limits) -> EmbeddingRequest:
    """A checked request; what the engine says of prompts is checked later."""
    fields = decode(body, _EMBEDDING)
    _REFUSALS.check(body, limits)
    if fields.dimensions is not None:
        raise bad_request(
            "dimensions is not supported: the beginning of a vector stands for the whole only "
            "where a model was trained for it (Matryoshka), which this one does not say; leave it "
            "out",
            param="dimensions",
            code="unsupported_parameter",
        )
    return fields


class EmbeddingRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        path, user = "/v1/embeddings", Scope.INFERENCE
        return [Route("POST", path, self.embeddings, user, EmbeddingRequest)]

    async def embeddings(self, request: Request) -> Response:
        """Make one text or several to vectors."""
        arrival_s = time.monotonic()
        state = self._state
        fields = parse_embedding(await read_json(request, state.limits), state.limits)
        name = state.check_model(fields.model)
        model = state.engine.model
        reader = PromptReader(model, state.limits, field="input")
        with _embedding_names():
            prompts = await reader.completion(
                fields.input, add_special_tokens=fields.add_special_tokens
            )
            prompts = fitted(prompts, fields.truncate_prompt_tokens, model=model)
            for prompt in prompts:
                check_prompt(prompt.token_ids, vocab_size=model.vocab_size)
            options = shape_options(state, prompts, NO_TOKENS, model=name, shows_prompt=True)
        shape = EmbeddingShape(
            options, state.logprob_shaper, encoding=fields.encoding_format or "float"
        )
        return generate(
            request,
            state,
            shape,
            NO_TOKENS,
            options=options_of(fields),
            stream=False,
            arrival_s=arrival_s,
            pooling=self._pooling(fields),
        )

    def _pooling(self, fields: EmbeddingRequest) -> PoolingParams:
        own = self._state.engine.model.tasks.embedding
        normalize = own.normalize if fields.normalize is None else fields.normalize
        pooling = fields.pooling or self._state.config.pooling or own.pooling
        return PoolingParams(pooling=pooling, normalize=normalize)


def options_of(fields: SchedulingFields) -> RequestOptions:
    """How the engine is to treat a request."""
    return RequestOptions(
        cache_salt=fields.cache_salt,
        priority=fields.priority,
        tenant=fields.tenant,
        deadline_ms=fields.deadline_ms,
    )


@contextmanager
def _embedding_names() -> Iterator[None]:
    """Let errors name the field `input`, which the core knows as the prompt."""
    try:
        yield
    except RequestError as error:
        if error.param == "prompt":
            error.param = "input"
        raise
