"""Text Generation Inference's surface: /generate, /generate_stream, / and /info.

What `huggingface_hub.InferenceClient` speaks to a server of one's own. Knows no engine.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import RequestOptions, SamplingParams, StructuredOutputsParams
from octavo.server.body import decode, read_json
from octavo.server.errors import bad_request, name_fields
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.prompts import PromptReader
from octavo.server.replies import json_response
from octavo.server.routes_ops import octavo_version
from octavo.server.state import EVENTS, JSON, Route, ServerState
from octavo.server.tgi_shape import TGIShape

DEFAULT_NEW_TOKENS = 100  # TGI's, since its version 2


class Grammar(msgspec.Struct):
    """The shape of the answer: type is json, with a schema as value, or regex."""

    type: str
    value: Any = None


class Parameters(msgspec.Struct, kw_only=True):
    """TGI's `GenerateParameters`. Without `do_sample` or a seed, a temperature draws, as there."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    """One prompt. `stream` counts on the root route only."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


_SAME_IN_SAMPLING = (
    "repetition_penalty",
    "frequency_penalty",
    "top_k",
    "top_p",
    "seed",
    "stop",
)

# What the core knows by other names.
_NAMES = {name: f"parameters.{name}" for name in ("temperature", *_SAME_IN_SAMPLING)} | {
    "max_tokens": "parameters.max_new_tokens",
    "prompt": "inputs",
    "structured_outputs": "parameters.grammar",
}

_REQUEST = msgspec.json.Decoder(GenerateRequest)


class TGIRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        user, body = Scope.INFERENCE, GenerateRequest
        return [
            Route("POST", "/", self.root, user, body, (JSON, EVENTS)),
            Route("POST", "/generate", self.generate, user, body),
            Route("POST", "/generate_stream", self.generate_stream, user, body, (EVENTS,)),
            Route("GET", "/info", self.info, user),
        ]

    async def root(self, request: Request) -> Response:
        """Either of the two below, as the body says."""
        fields = decode(await read_json(request, self._state.limits), _REQUEST)
        return await self._respond(request, fields, stream=fields.stream)

    async def generate(self, request: Request) -> Response:
        """The answer as one document."""
        fields = decode(await read_json(request, self._state.limits), _REQUEST)
        return await self._respond(request, fields, stream=False)

    async def generate_stream(self, request: Request) -> Response:
        """The answer as events, one for each token."""
        fields = decode(await read_json(request, self._state.limits), _REQUEST)
        return await self._respond(request, fields, stream=True)

    async def _respond(
        self, request: Request, fields: GenerateRequest, *, stream: bool
    ) -> Response:
        state, parameters = self._state, fields.parameters or Parameters()
        name_fields(request, _NAMES)
        sampling = _sampling(parameters)
        reader = PromptReader(state.engine.model, state.limits)
        prompts = await reader.completion(fields.inputs, add_special_tokens=True)
        shape = TGIShape(
            shape_options(state, prompts, sampling, model=state.engine.model.name),
            state.logprob_shaper,
            seed=sampling.seed,
            with_details=parameters.details,
            prefix=fields.inputs if parameters.return_full_text else "",
        )
        return generate(request, state, shape, sampling, options=RequestOptions(), stream=stream)

    async def info(self, request: Request) -> Response:
        """What runs here, in TGI's words."""
        model = self._state.engine.model
        return json_response(
            {
                "model_id": model.name,
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": None,
                "max_best_of": 1,
                "max_stop_sequences": None,
                "max_input_tokens": model.max_model_len - 1,
                "max_total_tokens": model.max_model_len,
                "router": "octavo",
                "version": octavo_version(),
            }
        )


def _sampling(parameters: Parameters) -> SamplingParams:
    """TGI draws where anything asks for a draw, and takes the likeliest token otherwise."""
    _refuse_unsupported(parameters)
    draws = parameters.do_sample or any(
        value is not None
        for value in (parameters.temperature, parameters.top_k, parameters.top_p, parameters.seed)
    )
    given = {
        name: value
        for name in _SAME_IN_SAMPLING
        if (value := getattr(parameters, name)) is not None
    }
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    max_tokens = parameters.max_new_tokens
    return SamplingParams(
        temperature=temperature if draws else 0.0,
        max_tokens=DEFAULT_NEW_TOKENS if max_tokens is None else max_tokens,
        logprobs=0 if parameters.details else None,
        structured_outputs=_shape(parameters.grammar),
        **given,
    )


def _refuse_unsupported(parameters: Parameters) -> None:
    """Whatever would change the answer and cannot be had."""
    neutral: dict[str, tuple[object, ...]] = {
        "best_of": (None, 1),
        "typical_p": (None, 1.0),
        "truncate": (None,),
        "watermark": (False,),
        "decoder_input_details": (False,),
        "top_n_tokens": (None, 0),
        "adapter_id": (None,),
    }
    for name, values in neutral.items():
        if getattr(parameters, name) not in values:
            raise _unsupported(name)


def _shape(grammar: Grammar | None) -> StructuredOutputsParams | None:
    if grammar is None:
        return None
    if grammar.type == "json" and isinstance(grammar.value, (dict, str)):
        return StructuredOutputsParams(json=grammar.value)
    if grammar.type == "regex" and isinstance(grammar.value, str):
        return StructuredOutputsParams(regex=grammar.value)
    message = "parameters.grammar.type must be json with a schema, or regex with a string"
    raise bad_request(message, param="parameters.grammar")


def _unsupported(name: str) -> Exception:
    message = f"parameters.{name} is not supported"
    return bad_request(message, param=f"parameters.{name}", code="unsupported_parameter")
