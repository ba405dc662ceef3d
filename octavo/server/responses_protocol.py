"""The request of OpenAI's Responses API: its fields, and what they mean as a request of a chat.

A conversation is a list of items here, and of messages there: `messages_of` is the way from one to
the other. Whatever comes after is the chat's own. Knows no engine and no store.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from octavo.errors import RequestError
from octavo.server.answer_shape import JsonSchemaFormat, ResponseFormat
from octavo.server.body import decode
from octavo.server.errors import HttpError, bad_request
from octavo.server.limits import Limits
from octavo.server.protocol import (
    CalledFunction,
    ChatRequest,
    ContentPart,
    FunctionName,
    FunctionTool,
    Message,
    NamedToolChoice,
    Neutral,
    Refusals,
    StreamOptions,
    Tool,
    ToolCall,
)


class InputPart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A piece of an item: a text, or an image where the model sees."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None  # images have the size that the model's own processor gives them
    file_id: str | None = None


class InputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message, a function call, its output, or what was thought before them."""

    type: str = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


class ResponseTool(msgspec.Struct, kw_only=True):
    """A tool that a client offers. Only functions are understood; `strict` has no effect."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, kw_only=True):
    """Forces the call of one function."""

    type: str
    name: str | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    """`response_format` of a chat, but flat: type is text, json_object or json_schema."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    """What form the text shall have."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses. The last lines are extensions, as in chat completions."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: TextOptions | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""
    deadline_ms: int | None = None

    @property
    def is_stored(self) -> bool:
        """As OpenAI, unless the client says otherwise."""
        return self.store is not False


# What would change the answer and cannot be had, by the words of `protocol`. Of the reasoning's
# effort, built-in tools' bounds and cache hints nothing here depends, so they pass.
REFUSED_IN_RESPONSES: dict[str, Neutral] = {
    "include": ([],),
    "top_logprobs": (0,),
    "prompt": (),
    "conversation": (),
    "context_management": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "n": (1,),
}
RESPONSES_REFUSALS = Refusals(ResponsesRequest, REFUSED_IN_RESPONSES)

RUNNING = ("queued", "in_progress")  # of a response's status: it will change

MAX_METADATA = 16  # all three are OpenAI's
MAX_METADATA_NAME_CHARS = 64
MAX_METADATA_CHARS = 512

_DECODER = msgspec.json.Decoder(ResponsesRequest)
_SAME_IN_CHAT = tuple(
    name
    for name in ResponsesRequest.__struct_fields__
    if name in ChatRequest.__struct_fields__ and name not in ("tools", "tool_choice")
)
_ROLES = ("user", "assistant", "system", "developer")


def parse_responses(body: bytes, limits: Limits) -> ResponsesRequest:
    """A checked request; what it shares with a chat is checked as one."""
    fields = decode(body, _DECODER)
    RESPONSES_REFUSALS.check(body, limits)
    _check_text(fields.text)
    _check_metadata(fields.metadata or {})
    if limits.is_too_deep(fields.reasoning):
        raise bad_request("reasoning is nested too deeply", param="reasoning")
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options needs stream to be true", param="stream_options")
    if fields.background:
        if not fields.is_stored:
            raise bad_request("background needs store to be true", param="background")
        if fields.stream:
            raise bad_request(
                "background together with stream is not supported: ask GET /v1/responses/{id}",
                param="stream",
                code="unsupported_parameter",
            )
    return fields


def _check_text(text: TextOptions | None) -> None:
    if text is None:
        return
    if text.verbosity not in (None, "medium"):
        raise _unsupported("text.verbosity")
    form = text.format
    if form is not None and form.type == "json_schema" and form.schema is None:
        raise bad_request("text.format.schema is required", param="text.format.schema")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise bad_request(f"metadata can have {MAX_METADATA} entries", param="metadata")
    for name, value in metadata.items():
        if len(name) > MAX_METADATA_NAME_CHARS or len(value) > MAX_METADATA_CHARS:
            raise bad_request(
                f"metadata: names have at most {MAX_METADATA_NAME_CHARS} characters, values "
                f"{MAX_METADATA_CHARS}",
                param="metadata",
            )


def chat_request(fields: ResponsesRequest) -> ChatRequest:
    """The same as a request of a chat, but for its messages, which need what came before."""
    same = {name: getattr(fields, name) for name in _SAME_IN_CHAT}
    tools = None
    if fields.tools is not None:
        tools = [_tool(tool, i) for i, tool in enumerate(fields.tools)]
    return ChatRequest(
        messages=[],
        max_completion_tokens=fields.max_output_tokens,
        tools=tools,
        tool_choice=_tool_choice(fields.tool_choice),
        response_format=_response_format(fields.text),
        **same,
    )


def _response_format(text: TextOptions | None) -> ResponseFormat | None:
    form = None if text is None else text.format
    if form is None or form.type != "json_schema":
        return None if form is None else ResponseFormat(form.type)
    schema = JsonSchemaFormat(form.name, form.description, form.schema, form.strict)
    return ResponseFormat(form.type, schema)


def _tool(tool: ResponseTool, index: int) -> Tool:
    if tool.type != "function":
        raise _unsupported(f"tools[{index}].type", "only tools of type function are supported")
    if tool.name is None:
        raise bad_request(f"tools[{index}].name is required", param=f"tools[{index}].name")
    return Tool("function", FunctionTool(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(choice: str | ResponseToolChoice | None) -> str | NamedToolChoice | None:
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type != "function":
        raise _unsupported("tool_choice.type", "only function can be chosen")
    if choice.name is None:
        raise bad_request("tool_choice.name is required", param="tool_choice.name")
    return NamedToolChoice(FunctionName(choice.name))


def input_items(fields: ResponsesRequest) -> list[InputItem]:
    """The request's own part of the conversation, checked."""
    if isinstance(fields.input, str):
        return [InputItem(role="user", content=fields.input)]
    if not fields.input:
        raise bad_request("input must not be empty", param="input")
    for i, item in enumerate(fields.input):
        _check_item(item, f"input[{i}]")
    return fields.input


# By type of an item: the fields that it cannot be without.
_REQUIRED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _check_item(item: InputItem, where: str) -> None:
    if item.type not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise _unsupported(f"{where}.type", f"only items of type {known} are supported")
    for name in _REQUIRED[item.type]:
        if getattr(item, name) is None:
            raise bad_request(f"{where}.{name} is required", param=f"{where}.{name}")
    if item.type == "message" and item.role not in _ROLES:
        known = ", ".join(_ROLES)
        raise bad_request(f"{where}.role must be one of {known}", param=f"{where}.role")
    for name in ("content", "output", "summary"):
        parts = getattr(item, name)
        for i, part in enumerate(parts if isinstance(parts, list) else ()):
            _check_part(part, f"{where}.{name}[{i}]")


def _check_part(part: InputPart, where: str) -> None:
    if part.type == "refusal" and part.refusal is not None:
        return
    if part.type == "input_image":
        if part.file_id is not None:
            raise _unsupported(f"{where}.file_id", "there are no files here, send an image_url")
        if part.image_url is None:
            raise bad_request(f"{where}.image_url is required", param=f"{where}.image_url")
        return
    if part.type not in _TEXT_PARTS:
        raise _unsupported(f"{where}.type", "only parts of text and input_image are supported")
    if part.text is None:
        raise bad_request(f"{where}.text is required", param=f"{where}.text")


def messages_of(items: Sequence[InputItem], instructions: str | None) -> list[Message]:
    """The conversation as a chat has it.

    What an assistant thought, said and called in a row is one message there.
    """
    messages = [] if instructions is None else [Message("system", instructions)]
    answer: Message | None = None  # the assistant's message that further items go into
    for item in items:
        if item.type == "function_call_output":
            answer = None
            messages.append(Message("tool", _parts(item.output), tool_call_id=item.call_id))
        elif item.type == "message" and item.role != "assistant":
            answer = None
            messages.append(Message(item.role or "user", _parts(item.content)))
        else:
            if answer is None or _begins_anew(answer, item):
                answer = Message("assistant")
                messages.append(answer)
            _add(answer, item)
    return [message for message in messages if _says_something(message)]


def _begins_anew(answer: Message, item: InputItem) -> bool:
    """Whether the item stands before what the message has already."""
    if item.type == "message":
        return answer.content is not None or answer.tool_calls is not None
    return item.type == "reasoning" and _says_something(answer)


def _add(answer: Message, item: InputItem) -> None:
    if item.type == "message":
        answer.content = _parts(item.content)
    elif item.type == "reasoning":
        thought = item.content if isinstance(item.content, list) else item.summary
        answer.reasoning_content = "\n".join(part.text or "" for part in thought or ())
    else:
        function = CalledFunction(item.name or "", item.arguments or "")
        answer.tool_calls = [*(answer.tool_calls or ()), ToolCall(function, item.call_id)]


def _says_something(message: Message) -> bool:
    thought_or_called = message.reasoning_content or message.tool_calls
    return message.content is not None or bool(thought_or_called)


def _parts(content: str | list[InputPart] | None) -> str | list[ContentPart]:
    if content is None or isinstance(content, str):
        return content or ""
    return [_chat_part(part) for part in content]


def _chat_part(part: InputPart) -> ContentPart:
    if part.type == "input_image":
        return ContentPart("image_url", image_url=part.image_url)
    return ContentPart("text", part.refusal or part.text or "")


def _unsupported(param: str, why: str | None = None) -> HttpError:
    message = f"{param} is not supported" if why is None else f"{param}: {why}"
    return bad_request(message, param=param, code="unsupported_parameter")


_PLACE = re.compile(r"\bmessages\[\d+\][\w.\[\]]*")  # in an error about a chat
# The names of a chat, as they begin, and those of the fields here.
_NAMES = (
    ("messages", "input"),
    ("prompt", "input"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
)


@contextmanager
def names_of_responses() -> Iterator[None]:
    """Let errors name the fields of this surface, where chat and core have other names.

    Positions are left out: those in the messages are not those in the input.
    """
    try:
        yield
    except HttpError as error:
        reply = error.reply
        if (param := _renamed(reply.param)) is not None:
            message = _PLACE.sub(param, reply.message.replace(reply.param or "", param))
            raise bad_request(message, param=param, code=reply.code) from None
        if reply.param == "tools":  # which are flat here
            message = reply.message.replace("].function.", "].")
            raise bad_request(message, param=reply.param, code=reply.code) from None
        raise
    except RequestError as error:
        if (param := _renamed(error.param)) is not None:
            error.args = (str(error).replace(error.param or "", param),)
            error.param = param
        raise


def _renamed(param: str | None) -> str | None:
    for theirs, ours in _NAMES:
        if param is not None and (param == theirs or param.startswith(f"{theirs}[")):
            return ours
    return None
