"""From a checked request of whatever surface to a response that generates: keys, bounds, books.

The one way to the engine, so that no surface can pass a limit by. Knows no surface's fields.
"""

import time
import uuid
from collections.abc import Sequence
from functools import partial
from hashlib import sha256

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import PoolingParams, RequestOptions, SamplingParams, resolve_max_tokens
from octavo.errors import RequestError
from octavo.server.allowance import UNBOUNDED
from octavo.server.answers import Answers, Task
from octavo.server.errors import ErrorReply, HttpError, bad_request
from octavo.server.generation_response import GenerationResponse
from octavo.server.keys import ApiKey
from octavo.server.prompts import Prompt
from octavo.server.response_shape import Shape, ShapeOptions
from octavo.server.state import ServerState, key_of


def shape_options(
    state: ServerState,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    model: str,
    return_token_ids: bool = False,
    include_usage: bool = False,
    shows_prompt: bool = False,
) -> ShapeOptions:
    """What the response will have to show; refuses what could not be answered.

    shows_prompt: there is something to be seen even if no token is generated.
    """
    if sampling.max_tokens == 0 and not shows_prompt:
        raise RequestError("max_tokens must be an integer at least 1, got 0", param="max_tokens")
    if len(prompts) * sampling.n > state.limits.max_choices:
        message = f"prompts times n must be at most {state.limits.max_choices}"
        raise bad_request(message, param="n")
    served = state.engine.model
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) is not None and not served.has_text:
            message = f"{name} spell tokens, and no tokenizer is loaded (skip_tokenizer_init)"
            raise bad_request(message, param=name)
    for prompt in prompts:
        resolve_max_tokens(len(prompt.token_ids), sampling.max_tokens, served.max_model_len)
    return ShapeOptions(
        model=model,
        prompts=prompts,
        num_per_prompt=sampling.n,
        with_logprobs=sampling.logprobs is not None,
        return_token_ids=return_token_ids,
        include_usage=include_usage,
        has_text=served.has_text,
    )


def generate(
    request: Request,
    state: ServerState,
    shape: Shape,
    sampling: SamplingParams,
    *,
    options: RequestOptions,
    stream: bool,
    arrival_s: float | None = None,
    pooling: PoolingParams | None = None,
) -> Response:
    """The response to a request; the engine hears of it when the response is sent."""
    key, max_model_len = key_of(request), state.engine.model.max_model_len
    prompts = shape.options.prompts
    options = msgspec.structs.replace(options, adapter=state.adapter_of(shape.options.model))
    _name(shape, request)
    answers = Answers(
        state.engine,
        prompts,
        Task(sampling, _of_key(options, key), pooling),
        response_id=shape.id,
        metrics=state.metrics,
        arrival_s=time.monotonic() if arrival_s is None else arrival_s,
        max_unread_deltas=state.limits.max_unread_deltas,
    )
    allowance = UNBOUNDED if key is None else key.allowance
    most = sum(_most_tokens(len(p.token_ids), sampling, max_model_len) for p in prompts)
    reserve = partial(allowance.reserve, most)
    return GenerationResponse(answers, shape, stream=stream, reserve=reserve)


def _name(shape: Shape, request: Request) -> None:
    """Let the ids begin with the client's own request id, where it chose one.

    Ids come with the first token; so a client can ask /debug/requests what it waits for until then.
    """
    request_id: str = request.scope["octavo.request_id"]
    if request.headers.get("x-request-id") == request_id:
        shape.id = f"{shape.id_prefix}{request_id}-{uuid.uuid4().hex[:12]}"


def _most_tokens(num_prompt_tokens: int, sampling: SamplingParams, max_model_len: int) -> int:
    """What a prompt and its answers may come to."""
    max_tokens = resolve_max_tokens(num_prompt_tokens, sampling.max_tokens, max_model_len)
    return num_prompt_tokens + sampling.num_sequences * max_tokens


def _of_key(options: RequestOptions, key: ApiKey | None) -> RequestOptions:
    """The client's options, for the key's tenant if it has one; nobody else finds their prefixes.

    A key without a tenant shares prefixes with no other key.
    """
    if key is None:
        return options
    tenant, sharers = key.entry.tenant, f"key {key.entry.name}"  # no tenant's name has a space
    if tenant is not None:
        if options.tenant not in ("", tenant):
            message = "this key is another tenant's"
            raise HttpError(ErrorReply(403, message, "permission_error", "tenant", "wrong_tenant"))
        options, sharers = msgspec.structs.replace(options, tenant=tenant), tenant
    salt = sha256(f"{sharers}/{options.cache_salt or ''}".encode()).hexdigest()
    return msgspec.structs.replace(options, cache_salt=salt)
