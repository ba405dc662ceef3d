"""KServe's inference protocol 2 and Triton's generate extension, with the tensor names of Triton's
vLLM backend: `text_input`, `text_output`, `sampling_parameters`. Knows no engine.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import RequestOptions, SamplingParams
from octavo.server.answer_shape import names_of_shape
from octavo.server.body import decode, read_json
from octavo.server.errors import bad_request, name_fields
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.kserve_shape import MODEL_VERSION, TEXT_OUTPUT, KServeShape
from octavo.server.prompts import PromptReader
from octavo.server.protocol import CompletionRequest, SamplingFields, sampling_params
from octavo.server.replies import json_response
from octavo.server.routes_ops import octavo_version, refuse_unready
from octavo.server.state import EVENTS, Route, ServerState

DEFAULT_MAX_TOKENS = 16  # vLLM's, and so that backend's
TEXT_INPUT = "text_input"
EXCLUDE_INPUT = "exclude_input_in_output"
SAMPLING = "sampling_parameters"


class GenerateRequest(msgspec.Struct, kw_only=True):
    """One prompt; `parameters` are sampling options, `stream` and `exclude_input_in_output`."""

    text_input: str
    id: str | None = None
    parameters: dict[str, Any] = {}


class Tensor(msgspec.Struct, kw_only=True):
    """An input of `/infer`, as JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferRequest(msgspec.Struct, kw_only=True):
    """Prompts as a tensor of BYTES, and optional tensors of one element."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: dict[str, Any] = {}


_GENERATE = msgspec.json.Decoder(GenerateRequest)
_INFER = msgspec.json.Decoder(InferRequest)
_SAMPLING = msgspec.json.Decoder(CompletionRequest)


class KServeRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        model, user, body = "/v2/models/{model}", Scope.INFERENCE, GenerateRequest
        return [
            Route("GET", "/v2/health/live", self.live, Scope.PUBLIC, media=()),
            Route("GET", "/v2/health/ready", self.ready, Scope.METRICS, media=()),
            Route("GET", "/v2", self.server, user),
            Route("GET", model, self.model, user),
            Route("GET", model + "/ready", self.model_ready, user, media=()),
            Route("POST", model + "/generate", self.generate, user, body),
            Route("POST", model + "/generate_stream", self.generate_stream, user, body, (EVENTS,)),
            Route("POST", model + "/infer", self.infer, user, InferRequest),
        ]

    async def live(self, request: Request) -> Response:
        """200 while the engine can answer."""
        self._state.engine.check_health()
        return Response()

    async def ready(self, request: Request) -> Response:
        """200 while new requests are welcome."""
        refusal = refuse_unready(self._state.engine, self._state.condition())
        return Response() if refusal is None else refusal

    async def server(self, request: Request) -> Response:
        """Name and version."""
        return json_response({"name": "octavo", "version": octavo_version(), "extensions": []})

    async def model(self, request: Request) -> Response:
        """The tensors of the model."""
        texts = {"datatype": "BYTES", "shape": [-1]}
        return json_response(
            {
                "name": self._state.check_model(request.path_params["model"]),
                "versions": [MODEL_VERSION],
                "platform": "octavo",
                "inputs": [
                    {"name": TEXT_INPUT} | texts,
                    {"name": SAMPLING, "datatype": "BYTES", "shape": [1]},
                    {"name": EXCLUDE_INPUT, "datatype": "BOOL", "shape": [1]},
                ],
                "outputs": [{"name": TEXT_OUTPUT} | texts],
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """200 where the model is here and new requests are welcome."""
        self._state.check_model(request.path_params["model"])
        return await self.ready(request)

    async def generate(self, request: Request) -> Response:
        """The answer to one prompt."""
        return await self._generate(request, stream=False)

    async def generate_stream(self, request: Request) -> Response:
        """The answer to one prompt, as events."""
        return await self._generate(request, stream=True)

    async def _generate(self, request: Request, *, stream: bool) -> Response:
        body = await read_json(request, self._state.limits)
        fields = decode(body, _GENERATE)
        options = dict(fields.parameters)
        options.pop("stream", None)
        exclude = options.pop(EXCLUDE_INPUT, False)
        return await self._respond(
            request,
            [fields.text_input],
            options,
            stream=stream,
            shape={"request_id": fields.id, "exclude_input": _boolean(exclude)},
        )

    async def infer(self, request: Request) -> Response:
        """The answers to one prompt or several, as a tensor."""
        fields = decode(await read_json(request, self._state.limits), _INFER)
        tensors = {tensor.name: tensor for tensor in fields.inputs}
        if unknown := tensors.keys() - {TEXT_INPUT, EXCLUDE_INPUT, SAMPLING, "stream"}:
            raise bad_request(f"there is no input {sorted(unknown)[0]:.64}", param="inputs")
        if TEXT_INPUT not in tensors:
            raise bad_request(f"the input {TEXT_INPUT} is required", param="inputs")
        prompts = _texts(tensors[TEXT_INPUT])
        if "stream" in tensors and _boolean(_single(tensors["stream"])):
            message = "infer answers as a whole; generate_stream streams"
            raise bad_request(message, param="inputs")
        exclude = _single(tensors[EXCLUDE_INPUT]) if EXCLUDE_INPUT in tensors else False
        options: dict[str, Any] = {}
        if SAMPLING in tensors:
            try:
                options = msgspec.json.decode(_texts(tensors[SAMPLING])[0], type=dict[str, Any])
            except msgspec.MsgspecError:
                message = f"{SAMPLING} must be a JSON object as text"
                raise bad_request(message, param=SAMPLING) from None
        shape = {"request_id": fields.id, "exclude_input": _boolean(exclude), "as_tensors": True}
        return await self._respond(request, prompts, options, stream=False, shape=shape)

    async def _respond(
        self,
        request: Request,
        texts: list[str],
        options: dict[str, Any],
        *,
        stream: bool,
        shape: dict[str, Any],
    ) -> Response:
        state = self._state
        name = state.check_model(request.path_params["model"])
        name_fields(request, names_of_shape(options.get("response_format"), forced=False))
        sampling = _sampling(options, state)
        reader = PromptReader(state.engine.model, state.limits)
        prompts = await reader.completion(list(texts), add_special_tokens=True)
        wanted = shape_options(state, prompts, sampling, model=name)
        answers = KServeShape(wanted, state.logprob_shaper, **shape)
        return generate(request, state, answers, sampling, options=RequestOptions(), stream=stream)


def _sampling(options: dict[str, Any], state: ServerState) -> SamplingParams:
    """vLLM's names, read as strictly as in `/v1/completions`."""
    known = set(SamplingFields.__struct_fields__) - {"model", "n", "stream", "stream_options"}
    if unknown := options.keys() - known:
        name = sorted(unknown)[0]
        raise bad_request(f"{name:.64} is no sampling parameter here", param=f"{name:.64}")
    fields = decode(msgspec.json.encode(options | {"prompt": ""}), _SAMPLING)
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    return sampling_params(fields, state.limits, max_tokens=max_tokens, logprobs=None)


def _texts(tensor: Tensor) -> list[str]:
    if tensor.datatype != "BYTES" or not all(isinstance(text, str) for text in tensor.data):
        raise bad_request(f"{tensor.name} must hold texts, as BYTES", param=tensor.name)
    count = 1
    for size in tensor.shape:
        count *= max(0, size)
    if count != len(tensor.data) or not tensor.data:
        message = f"the shape of {tensor.name} does not fit its {len(tensor.data)} elements"
        raise bad_request(message, param=tensor.name)
    return list(tensor.data)


def _single(tensor: Tensor) -> Any:
    if len(tensor.data) != 1:
        raise bad_request(f"{tensor.name} must have one element", param=tensor.name)
    return tensor.data[0]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_request("a flag must be true or false", param=EXCLUDE_INPUT)
    return value
