"""The requests of the OpenAI API, with vLLM's extensions: fields, strict types, what is refused.

Three kinds of field. The ones declared here work. The ones in the `REFUSED` tables would change the
answer, and we cannot do them yet: any value but a neutral one is a 400 that names the field. All
others are ignored, as OpenAI does, and their names are logged once (`unknown_fields`).
Types are strict: "1" and true are no numbers, 1.0 is no integer, NaN is no JSON.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from octavo.core import SamplingParams, StructuredOutputsParams
from octavo.server.answer_shape import ResponseFormat, answer_shape
from octavo.server.body import decode
from octavo.server.errors import bad_request
from octavo.server.limits import Limits

logger = logging.getLogger(__name__)


class StreamOptions(msgspec.Struct):
    """`include_obfuscation` is accepted without effect: no padding is ever added."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(msgspec.Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logit_bias: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""
    deadline_ms: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


PromptField = str | list[str | int | list[int]]


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: PromptField
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct):
    """A piece of a message: text, or an image or video by its URL, in an object or by itself.

    `fps` stands beside a video: the frames of a second that are looked at, or, of a list of frames,
    that there are.
    """

    type: str
    text: str | None = None
    image_url: dict[str, Any] | str | None = None
    video_url: dict[str, Any] | str | None = None
    fps: float | None = None


class CalledFunction(msgspec.Struct):
    """What an assistant called; `arguments` is JSON text, or the object itself."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """One turn of a conversation. `reasoning` is another name of `reasoning_content`."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionTool(msgspec.Struct):
    """A function that the model may call. `strict` has no effect: arguments are not forced."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool that a client offers. Only functions are understood."""

    type: str
    function: FunctionTool | None = None


class FunctionName(msgspec.Struct):
    """The name of a function."""

    name: str


class NamedToolChoice(msgspec.Struct):
    """Forces the call of one function."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Neutral = tuple[object, ...]  # JSON values that ask for nothing; null always is one

# vLLM's old names, and other servers'.
_OTHER_NAMES_OF_SHAPES = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("regex", "json_schema", "ebnf"),
)
_REFUSED: dict[str, Neutral] = {
    **dict.fromkeys(_OTHER_NAMES_OF_SHAPES, ()),
    "prompt_embeds": (),
    "logits_processors": ([],),
}
REFUSED_IN_COMPLETIONS = _REFUSED | {"suffix": ("",)}
REFUSED_IN_CHAT = _REFUSED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
    "echo": (False,),
    "best_of": (1,),
    "thinking_token_budget": (),
}
# Known to change no answer here, so not worth a word in the log.
_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)

_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_CHAT = msgspec.json.Decoder(ChatRequest)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LOGIT_BIAS = msgspec.json.Decoder(dict[str, float] | None)


class Refusals:
    """The fields of one surface that are refused, and the ones that have been wondered about."""

    def __init__(self, request_type: type[msgspec.Struct], refused: Mapping[str, Neutral]):
        self._refused = refused
        fields = [(name, msgspec.Raw, msgspec.Raw()) for name in refused]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Refused", fields))
        self._known = frozenset(request_type.__struct_fields__) | set(refused) | _WITHOUT_EFFECT
        self._logged: set[str] = set()

    def check(self, body: bytes, limits: Limits) -> None:
        """Refuse what would change the answer; log, once, what is ignored."""
        values = msgspec.structs.asdict(decode(body, self._decoder))
        for name, neutral in self._refused.items():
            raw = bytes(values[name])
            if raw and not _is_neutral(raw, neutral):
                remedy = (
                    "; use structured_outputs, or response_format"
                    if name in _OTHER_NAMES_OF_SHAPES
                    else ""
                )
                raise bad_request(
                    f"{name} is not supported{remedy}", param=name, code="unsupported_parameter"
                )
        if len(body) <= limits.max_inspected_bytes:
            self._log_unknown(body)

    def _log_unknown(self, body: bytes) -> None:
        for name in decode(body, _OBJECT).keys() - self._known - self._logged:
            if len(self._logged) == 100:  # somebody plays with us
                return
            self._logged.add(name)
            logger.warning("request field %.64r is unknown here and ignored", name)


def _is_neutral(raw: bytes, neutral: Neutral) -> bool:
    if len(raw) > 64:
        return False
    value = msgspec.json.decode(raw)
    return value is None or value in neutral


COMPLETION_REFUSALS = Refusals(CompletionRequest, REFUSED_IN_COMPLETIONS)
CHAT_REFUSALS = Refusals(ChatRequest, REFUSED_IN_CHAT)


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """A checked request; the ranges of sampling options are `sampling_params`'s to check."""
    fields = decode(body, _COMPLETION)
    COMPLETION_REFUSALS.check(body, limits)
    _check_stream_options(fields)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise bad_request("best_of is supported only where it equals n", param="best_of")
    _check_prompt_logprobs(fields)
    return fields


def parse_chat(body: bytes, limits: Limits) -> ChatRequest:
    """A checked request; the ranges of sampling options are `sampling_params`'s to check."""
    fields = decode(body, _CHAT)
    CHAT_REFUSALS.check(body, limits)
    _check_stream_options(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
    _check_prompt_logprobs(fields)
    return fields


def _check_prompt_logprobs(fields: CompletionRequest | ChatRequest) -> None:
    if fields.stream and fields.prompt_logprobs is not None:
        raise bad_request(
            "prompt_logprobs come with whole responses: leave stream out, or, of "
            "/v1/completions, take echo and logprobs, which stream",
            param="prompt_logprobs",
        )


def _check_stream_options(fields: SamplingFields) -> None:
    if fields.stream_options is None:
        return
    if not fields.stream:
        raise bad_request("stream_options needs stream to be true", param="stream_options")
    if fields.stream_options.continuous_usage_stats:
        raise bad_request(
            "continuous_usage_stats is not supported; include_usage is",
            param="stream_options.continuous_usage_stats",
            code="unsupported_parameter",
        )


_SAME_IN_SAMPLING = tuple(
    name
    for name in SamplingFields.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in ("logit_bias", "max_tokens")
)


def sampling_params(
    fields: SamplingFields,
    limits: Limits,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The sampling options of a request; `SamplingParams` refuses what is out of range."""
    given: dict[str, Any] = {}
    for name in _SAME_IN_SAMPLING:
        value = getattr(fields, name)
        if value is not None:
            given[name] = value
    for name in ("stop_token_ids", "allowed_token_ids"):
        if len(given.get(name, ())) > limits.max_listed_token_ids:
            raise bad_request(f"{name} has too many entries", param=name)
    logit_bias = _logit_bias(fields.logit_bias, limits)
    shape = answer_shape(fields.response_format, fields.structured_outputs, limits)
    given["structured_outputs"] = shape
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=logit_bias,
        **given,
    )


def _logit_bias(raw: msgspec.Raw, limits: Limits) -> dict[int, float] | None:
    """JSON knows no integer keys, so token ids come as strings of digits."""
    text = bytes(raw)
    if not text:
        return None
    if len(text) > limits.max_logit_bias_bytes:
        raise bad_request("logit_bias has too many entries", param="logit_bias")
    try:
        table = _LOGIT_BIAS.decode(text)
    except msgspec.MsgspecError:
        raise bad_request("logit_bias must map token ids to numbers", param="logit_bias") from None
    if table is None:
        return None
    if not all(key.isascii() and key.isdecimal() and len(key) < 19 for key in table):
        raise bad_request("the keys of logit_bias must be token ids", param="logit_bias")
    return {int(key): bias for key, bias in table.items()}
