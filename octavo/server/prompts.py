"""From a request's prompt or messages to token ids, within bounds and off the event loop.

Texts that cannot fit the context are refused by their length in characters, before any tokenizing.
Knows no sampling and no HTTP.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from octavo.core import NO_IMAGES, SeenImages
from octavo.engine import ServedModel
from octavo.errors import ContextLengthError
from octavo.server.errors import bad_request
from octavo.server.images import DECODING, KINDS, SentImages
from octavo.server.limits import Limits
from octavo.server.protocol import Message, PromptField, ToolCall
from octavo.text.content_parts import shows_plain_text
from octavo.vision.parts import with_parts

T = TypeVar("T")

# OpenAI renamed "system" to "developer"; templates mostly know the old name only.
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system"}

# What transformers' function takes besides a template's arguments; no template knows them.
_RESERVED = frozenset(
    {"tokenize", "chat_template", "conversation", "tools", "continue_final_message"}
)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine gets, and the text where the client sent one."""

    token_ids: list[int]
    text: str | None = None
    images: SeenImages = NO_IMAGES


def truncated(prompts: Sequence[Prompt], limit: int | None, *, room: int) -> list[Prompt]:
    """The last `limit` tokens of each prompt, as vLLM's `truncate_prompt_tokens`.

    -1 keeps what leaves space for the answer: `room`. A prompt that was cut has no text.
    """
    if limit is None:
        return list(prompts)
    keep = _kept(limit, room)
    return [prompt if len(prompt.token_ids) <= keep else _cut(prompt, keep) for prompt in prompts]


def _cut(prompt: Prompt, keep: int) -> Prompt:
    if prompt.images.places:
        message = f"a prompt with images cannot be cut to {keep} tokens: leave some of them out"
        raise bad_request(message, param="truncate_prompt_tokens")
    return Prompt(prompt.token_ids[-keep:])


def fitted(prompts: Sequence[Prompt], limit: int | None, *, model: ServedModel) -> list[Prompt]:
    """As `truncated`, of prompts that are to be vectors.

    Of an encoder's it is the first tokens that stay, and the last one, which ends every text: so
    sentence-transformers cuts them, too.
    """
    if limit is None or model.tasks.generates:
        return truncated(prompts, limit, room=model.max_model_len)
    keep = _kept(limit, model.max_model_len)
    return [
        prompt
        if len(prompt.token_ids) <= keep
        else Prompt([*prompt.token_ids[: keep - 1], prompt.token_ids[-1]])
        for prompt in prompts
    ]


def _kept(limit: int, room: int) -> int:
    if limit < 1 and limit != -1:
        message = "truncate_prompt_tokens must be a positive integer, or -1"
        raise bad_request(message, param="truncate_prompt_tokens")
    return max(1, room) if limit == -1 else limit


class PromptReader:
    """Tokenizes prompts of one model. `field` is what requests call them."""

    def __init__(self, model: ServedModel, limits: Limits, *, field: str = "prompt"):
        self._model = model
        self._limits = limits
        self._field = field

    async def completion(self, field: PromptField, *, add_special_tokens: bool) -> list[Prompt]:
        """One prompt or many, as text or as ids."""
        items = self._items(field)
        texts = [item for item in items if isinstance(item, str)]
        for text in texts:
            self._check_chars(len(text), self._field)
        encode = self._model.tokenizer.encode

        def build() -> list[Prompt]:
            return [
                Prompt(encode(item, add_special_tokens=add_special_tokens), item)
                if isinstance(item, str)
                else Prompt(item)
                for item in items
            ]

        return await self._run(build, num_chars=sum(map(len, texts)))

    async def pairs(self, texts: Sequence[tuple[str, str]], limit: int | None) -> list[Prompt]:
        """Each pair of texts as one prompt, the types of its tokens included.

        limit: at most so many tokens, as `truncate_prompt_tokens` of `truncated`; the longer text
            is cut first, at its end.
        """
        model = self._model
        if len(texts) > self._limits.max_prompts:
            message = f"at most {self._limits.max_prompts} pairs can go into one request"
            raise bad_request(message, param=self._field)
        keep = None if limit is None else _kept(limit, model.max_model_len)
        for text in itertools.chain.from_iterable(texts):
            self._check_chars(len(text), self._field)

        def build() -> list[Prompt]:
            encoded = (model.tokenizer.encode_pair(*pair) for pair in texts)
            cut = (one if keep is None else one.cut_to(keep) for one in encoded)
            num_types = model.tasks.num_token_types
            return [Prompt(one.with_types(model.vocab_size, num_types)) for one in cut]

        return await self._run(build, num_chars=sum(len(a) + len(b) for a, b in texts))

    def _items(self, field: PromptField) -> Sequence[str | list[int]]:
        if isinstance(field, str):
            return [field]
        texts = [item for item in field if isinstance(item, str)]
        ids = [item for item in field if isinstance(item, int)]
        lists = [item for item in field if isinstance(item, list)]
        if len(ids) == len(field):  # true of [] also: the empty prompt, which the engine refuses
            return [ids]
        if len(field) > self._limits.max_prompts:
            message = f"at most {self._limits.max_prompts} prompts can go into one request"
            raise bad_request(message, param=self._field)
        if len(texts) == len(field):
            return texts
        if len(lists) == len(field):
            return lists
        message = f"{self._field} must not mix texts and token ids"
        raise bad_request(message, param=self._field)

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> Prompt:
        """The rendered conversation."""
        if not messages:
            raise bad_request("messages must not be empty", param="messages")
        if continue_final_message and add_generation_prompt:
            raise bad_request(
                "a message that is continued is followed by no other: with continue_final_message, "
                "add_generation_prompt must be false",
                param="continue_final_message",
            )
        reader = self._model.images
        sent = SentImages(reader, self._limits)
        turns = [_turn(message, i, self._limits, sent) for i, message in enumerate(messages)]
        _name_results(turns)
        num_chars = sum(_num_chars(value) for turn in turns for value in turn.values())
        num_chars += _num_chars(template_arguments or "")
        self._check_chars(num_chars, "messages")
        tokenizer = self._model.tokenizer

        def build() -> Prompt:
            as_parts = reader is not None and not shows_plain_text(tokenizer)
            token_ids = tokenizer.encode_chat(
                [with_parts(turn) for turn in turns] if as_parts else turns,
                add_generation_prompt=add_generation_prompt,
                template_arguments=template_arguments,
                continue_final_message=continue_final_message,
            )
            if reader is None or not sent:
                return Prompt(token_ids)
            token_ids, images = reader.lay_out(token_ids, *sent.read())
            return Prompt(token_ids, images=images)

        if sent:
            await sent.fetch()
            return await asyncio.get_running_loop().run_in_executor(DECODING, build)
        return await self._run(build, num_chars=num_chars)

    def _check_chars(self, num_chars: int, param: str) -> None:
        max_model_len = self._model.max_model_len
        if num_chars > self._limits.max_prompt_chars(max_model_len):
            raise ContextLengthError(
                f"the prompt has {num_chars} characters, more than a context of {max_model_len} "
                "tokens can hold",
                param=param,
            )

    async def _run(self, build: Callable[[], T], *, num_chars: int) -> T:
        if num_chars > self._limits.max_inline_chars:
            return await asyncio.to_thread(build)
        return build()


def arguments_of_template(
    given: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]] | None, limits: Limits
) -> dict[str, Any]:
    """What the template gets besides messages: `chat_template_kwargs`, checked, and tools."""
    param, arguments = "chat_template_kwargs", dict(given or {})
    for name in arguments.keys() & _RESERVED:
        message = f"{name} is set by the server and cannot be a template argument"
        raise bad_request(message, param=param)
    if limits.is_too_deep(arguments):
        raise bad_request(f"{param} is nested too deeply", param=param)
    if _num_chars(arguments) > limits.max_template_kwargs_bytes:
        message = f"{param} has more than {limits.max_template_kwargs_bytes} bytes of JSON"
        raise bad_request(message, param=param)
    return arguments if tools is None else arguments | {"tools": tools}


def _num_chars(value: object) -> int:
    """Characters of a text, or bytes of the JSON of other data."""
    return len(value) if isinstance(value, str) else len(msgspec.json.encode(value))


def _turn(message: Message, index: int, limits: Limits, sent: SentImages) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        known = ", ".join(_ROLES)
        raise bad_request(f"{where}.role must be one of {known}", param=f"{where}.role")
    thought = message.reasoning_content or message.reasoning
    calls = message.tool_calls or []
    if len(calls) > limits.max_tool_calls:
        text = f"{where}.tool_calls: at most {limits.max_tool_calls} calls in a message"
        raise bad_request(text, param=f"{where}.tool_calls")
    if (thought or calls) and message.role != "assistant":
        name = "tool_calls" if calls else "reasoning_content"
        raise bad_request(f"{where}.{name} belongs to assistants", param=f"{where}.{name}")
    if message.content is None and not (thought or calls):
        raise bad_request(f"{where}.content is required", param=f"{where}.content")
    # Most templates look for tags in the content, so it is a text even where there is none. Of the
    # others they ask whether they are defined.
    turn: dict[str, Any] = {"role": _ROLES[message.role], "content": _content(message, where, sent)}
    others = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": thought,
        "tool_calls": [_call(call, f"{where}.tool_calls", limits) for call in calls] or None,
    }
    return turn | {name: value for name, value in others.items() if value is not None}


def _name_results(turns: Sequence[dict[str, Any]]) -> None:
    """Name the function of each result: some templates ask, and OpenAI's clients do not say."""
    names: dict[str, str] = {}
    for turn in turns:
        names |= {c["id"]: c["function"]["name"] for c in turn.get("tool_calls", ()) if "id" in c}
        if turn["role"] == "tool" and turn.get("tool_call_id") in names:
            turn.setdefault("name", names[turn["tool_call_id"]])


def _call(call: ToolCall, where: str, limits: Limits) -> dict[str, Any]:
    """A call as chat templates expect it: arguments are an object where the text is one's."""
    arguments: str | dict[str, Any] = call.function.arguments or {}
    if isinstance(arguments, str):
        with suppress(msgspec.MsgspecError, RecursionError):
            arguments = _OBJECT.decode(arguments)
    if limits.is_too_deep(arguments):
        raise bad_request(f"{where}: arguments are nested too deeply", param=where)
    shaped = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return shaped if call.id is None else {"id": call.id} | shaped


def _content(message: Message, where: str, sent: SentImages) -> str | list[dict[str, Any]]:
    """A text, or where images are among its parts, these parts. The images are noted."""
    if isinstance(message.content, str):
        return message.content
    parts: list[dict[str, Any]] = []
    num_sent = len(sent)
    for i, part in enumerate(message.content or ()):
        param = f"{where}.content[{i}]"
        if part.type in KINDS:
            parts.append(sent.add(part, param))
            continue
        if part.type != "text":
            raise bad_request(
                f"{param}: only parts of type text, {' and '.join(KINDS)} are supported",
                param=f"{param}.type",
                code="unsupported_parameter",
            )
        if part.text is None:
            raise bad_request(f"{param}.text is required", param=f"{param}.text")
        parts.append({"type": "text", "text": part.text})
    if len(sent) > num_sent:
        return parts
    return "\n".join(part["text"] for part in parts)
