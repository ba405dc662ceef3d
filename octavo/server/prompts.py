"""From a request's prompt or messages to token ids, within bounds and off the event loop.

Texts that cannot fit the context are refused by their length in characters, before any tokenizing.
Knows no sampling and no HTTP.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from octavo.engine import ServedModel
from octavo.errors import ContextLengthError
from octavo.server.errors import bad_request
from octavo.server.limits import Limits
from octavo.server.protocol import Message, PromptField

T = TypeVar("T")

# OpenAI renamed "system" to "developer"; templates mostly know the old name only.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine gets, and the text where the client sent one."""

    token_ids: list[int]
    text: str | None = None


def truncated(prompts: Sequence[Prompt], limit: int | None, *, room: int) -> list[Prompt]:
    """The last `limit` tokens of each prompt, as vLLM's `truncate_prompt_tokens`.

    -1 keeps what leaves space for the answer: `room`. A prompt that was cut has no text.
    """
    if limit is None:
        return list(prompts)
    if limit < 1 and limit != -1:
        message = "truncate_prompt_tokens must be a positive integer, or -1"
        raise bad_request(message, param="truncate_prompt_tokens")
    keep = max(1, room) if limit == -1 else limit
    return [
        prompt if len(prompt.token_ids) <= keep else Prompt(prompt.token_ids[-keep:])
        for prompt in prompts
    ]


class PromptReader:
    """Tokenizes prompts of one model."""

    def __init__(self, model: ServedModel, limits: Limits):
        self._model = model
        self._limits = limits

    async def completion(self, field: PromptField, *, add_special_tokens: bool) -> list[Prompt]:
        """One prompt or many, as text or as ids."""
        items = self._items(field)
        texts = [item for item in items if isinstance(item, str)]
        for text in texts:
            self._check_chars(len(text), "prompt")
        encode = self._model.tokenizer.encode

        def build() -> list[Prompt]:
            return [
                Prompt(encode(item, add_special_tokens=add_special_tokens), item)
                if isinstance(item, str)
                else Prompt(item)
                for item in items
            ]

        return await self._run(build, num_chars=sum(map(len, texts)))

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
            raise bad_request(message, param="prompt")
        if len(texts) == len(field):
            return texts
        if len(lists) == len(field):
            return lists
        raise bad_request("prompt must not mix texts and token ids", param="prompt")

    async def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Prompt:
        """The rendered conversation."""
        if not messages:
            raise bad_request("messages must not be empty", param="messages")
        turns = [_turn(message, i) for i, message in enumerate(messages)]
        num_chars = sum(len(text) for turn in turns for text in turn.values())
        self._check_chars(num_chars, "messages")
        encode_chat = self._model.tokenizer.encode_chat

        def build() -> Prompt:
            return Prompt(encode_chat(turns, add_generation_prompt=add_generation_prompt))

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


def _turn(message: Message, index: int) -> Mapping[str, Any]:
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        known = ", ".join(_ROLES)
        raise bad_request(f"{where}.role must be one of {known}", param=f"{where}.role")
    if message.content is None:
        raise bad_request(f"{where}.content is required", param=f"{where}.content")
    turn = {"role": _ROLES[message.role], "content": _text_of(message, where)}
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content or ()):
        param = f"{where}.content[{i}]"
        if part.type != "text":
            raise bad_request(
                f"{param}: only parts of type text are supported",
                param=f"{param}.type",
                code="unsupported_parameter",
            )
        if part.text is None:
            raise bad_request(f"{param}.text is required", param=f"{param}.text")
        texts.append(part.text)
    return "\n".join(texts)
