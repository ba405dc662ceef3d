"""How a model talks in a chat: whether its template takes tools, and how to read its answers.

Chosen by the operator, or found by asking the template for examples: what a template writes says
more than its source, which may get there in many ways.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.core import SamplingParams, StructuredOutputsParams
from octavo.errors import RequestError
from octavo.server import reasoning, tool_parsers
from octavo.server.chat_parser import ChatParser
from octavo.server.config import ServerConfig
from octavo.server.errors import bad_request
from octavo.server.prompts import Prompt
from octavo.server.reasoning import ThinkParser
from octavo.server.tool_parsers import TOOL_PARSERS, JsonParser, ToolParser
from octavo.server.tools import OfferedTools
from octavo.text import Tokenizer

_NAME = "octavo_probe"
_USER = {"role": "user", "content": "Hi"}
_PARAMETERS = {"type": "object", "properties": {}}
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "None.", "parameters": _PARAMETERS},
}
_CALL = {"type": "function", "id": "probe0000", "function": {"name": _NAME, "arguments": {}}}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_THINKING = {"role": "assistant", "content": f"{reasoning.OPEN}Hm{reasoning.CLOSE}Hi"}

_MARKERS = (tool_parsers.OPEN, tool_parsers.CLOSE, reasoning.OPEN, reasoning.CLOSE)
_NUM_TAIL_TOKENS = 16  # of a prompt: enough for a tag and white space, however it is tokenized


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """What is known of one model's chats."""

    tokenizer: Tokenizer
    tool_parser: type[ToolParser] | None  # None: its template takes no tools
    splits_reasoning: bool
    has_special_markers: bool  # control tokens, which a text leaves out unless it is told not to

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: ServerConfig) -> "ChatStyle":
        """The style of a tokenizer's template; the operator's word goes first."""
        name: str | None = config.tool_call_parser
        if name == "auto":
            name = _guessed_tool_parser(tokenizer)
        splits = config.reasoning_parser == "think"
        if config.reasoning_parser == "auto":
            splits = _reasons(tokenizer)
        ids = tokenizer.special_token_ids
        special = {tokenizer.decode([i], skip_special_tokens=False) for i in ids}
        return cls(
            tokenizer,
            None if name is None else TOOL_PARSERS[name],
            splits,
            not special.isdisjoint(_MARKERS),
        )

    def parsers(
        self, tools: OfferedTools | None, prompt: Prompt
    ) -> Callable[[], ChatParser] | None:
        """Makes a parser for each answer to a prompt; None where answers are only text."""
        find, splits = self.tool_parser, self.splits_reasoning
        if tools is not None and tools.schema is not None:
            find = JsonParser  # whatever the model's own form of a call is
        if tools is None and not splits:
            return None
        opened = splits and self._is_opened(prompt)

        def parser() -> ChatParser:
            return ChatParser(
                ThinkParser(opened=opened) if splits else None,
                None if find is None or tools is None else find(tools.names),
                parallel=tools is None or tools.parallel,
            )

        return parser

    def check_tools(self, tools: OfferedTools | Sequence[Mapping[str, Any]] | None) -> None:
        """Refuse tools, or their definitions, that the model would not hear of."""
        if tools is not None and self.tool_parser is None:
            raise bad_request(
                "this model's chat template writes no tools into the prompt: serve a model whose "
                "template does, or, if it does so in a way that was not recognised, name the "
                "format of its calls with --tool-call-parser",
                param="tools",
                code="unsupported_parameter",
            )

    def sampling(
        self, sampling: SamplingParams, tools: OfferedTools | None, prompt: Prompt
    ) -> SamplingParams:
        """The same, but for what tools and reasoning demand.

        A call that is forced is a shape of the answer; reasoning comes before a shape; markers stay
        in the text where the answer is searched for them.
        """
        changes: dict[str, Any] = {}
        shape = sampling.structured_outputs
        if tools is not None and tools.schema is not None:
            if shape is not None:
                message = "tool_choice forces a call: there can be no other shape of the answer"
                raise bad_request(message, param="tool_choice")
            shape = StructuredOutputsParams(json=dict(tools.schema))
        if shape is not None and self.splits_reasoning and self._is_opened(prompt):
            shape = msgspec.structs.replace(shape, after=reasoning.CLOSE)
        if shape is not sampling.structured_outputs:
            changes["structured_outputs"] = shape
        if self.has_special_markers and (tools is not None or self.splits_reasoning):
            changes["skip_special_tokens"] = False
        return msgspec.structs.replace(sampling, **changes) if changes else sampling

    def _is_opened(self, prompt: Prompt) -> bool:
        """Whether the template has written the opening tag itself."""
        tail = prompt.token_ids[-_NUM_TAIL_TOKENS:]
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return text.rstrip().endswith(reasoning.OPEN)


def _guessed_tool_parser(tokenizer: Tokenizer) -> str | None:
    offered = _rendered(tokenizer, [_USER], {"tools": [_TOOL]})
    if _NAME not in offered:
        return None
    called = _rendered(tokenizer, [_USER, _CALLING], {"tools": [_TOOL]})
    return "hermes" if tool_parsers.OPEN in offered + called else "json"


def _reasons(tokenizer: Tokenizer) -> bool:
    """Whether the template takes old reasoning out, or writes tags itself, to think or not to."""
    turns = [_USER, _THINKING, _USER]
    texts = [_rendered(tokenizer, turns, more) for more in ({}, {"enable_thinking": False})]
    return any(
        text.count(reasoning.CLOSE) != 1 or text.rstrip().endswith(reasoning.OPEN)
        for text in texts
        if text
    )


def _rendered(
    tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> str:
    """What the template writes; nothing where it refuses."""
    try:
        return tokenizer.apply_chat_template(turns, template_arguments=arguments)
    except RequestError:
        return ""
