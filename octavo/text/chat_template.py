"""Chat templates: Jinja from the checkpoint, run in a sandbox as transformers runs it.

Owns the environment that templates expect; `template_sandbox` has the limits around
them. Knows no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from octavo.config import excerpt
from octavo.errors import CheckpointError, RequestError
from octavo.text.template_budget import BudgetError, budgeted, pay_for_text
from octavo.text.template_sandbox import Sandbox

MAX_SOURCE_CHARS = 2**17  # the longest real ones have 30,000
# A million tokens of English. The tokenizers library takes some 200 bytes for each, and a damaged
# vocabulary may make every character one.
MAX_RENDERED_CHARS = 2**22
MAX_DATE_CHARS = 1000
# Put behind the text that is to be continued: a Unicode noncharacter, which nobody writes, and a
# space, by which it shows whether the template trims texts.
_END_OF_TEXT = "\ufdd2 "


class ChatTemplate:
    """One compiled template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compile `source`; `special_tokens` are variables such as "bos_token".

        Raises:
            CheckpointError: the template is no valid Jinja, or absurdly long.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise CheckpointError(f"the chat template has {len(source)} characters")
        try:
            self._template = _environment().from_string(source)
        # Jinja raises more than its own errors: of Python's compiler, for blocks nested too deeply.
        except Exception as error:
            raise CheckpointError(
                f"the chat template is no valid Jinja: {excerpt(error)}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool,
        template_arguments: Mapping[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation. Arguments are plain JSON-like data.

        continue_final_message: all that the template writes behind the last message's text is left
            out, as by transformers' argument of that name.

        Raises:
            RequestError: the template refuses these messages or fails on them.
        """
        if continue_final_message:
            messages = [*messages[:-1], _with_its_end_marked(messages[-1])]
            rendered = self._run(messages, False, template_arguments)
            return _cut_at_the_mark(rendered)
        return self._run(messages, add_generation_prompt, template_arguments)

    def _run(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool,
        template_arguments: Mapping[str, Any],
    ) -> str:
        # Templates ask whether `tools` and `documents` are none, so they must be defined.
        variables = {"tools": None, "documents": None} | dict(template_arguments)
        own = self._special_tokens | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        for name in variables:
            if name in own or name in self._template.environment.globals:
                raise RequestError(
                    f"{name} is set by the server and cannot be a template argument",
                    param="chat_template_kwargs",
                )
        pieces = []
        num_chars = 0
        try:
            with budgeted():
                for piece in self._template.generate(variables | own):
                    pieces.append(piece)
                    num_chars += len(piece)
                    if num_chars > MAX_RENDERED_CHARS:
                        raise RequestError(
                            "the rendered conversation is too long", param="messages"
                        )
        except RequestError:
            raise
        except (_Refusal, jinja2.UndefinedError, BudgetError) as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {excerpt(error)}",
                param="messages",
            ) from error
        # A template is foreign code: whatever it does, only this request fails. Other errors'
        # texts may quote data, so they are not shown.
        except Exception as error:
            raise RequestError(
                f"the model's chat template fails on these messages ({type(error).__name__})",
                param="messages",
            ) from error
        return "".join(pieces)


def _with_its_end_marked(message: Any) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or not content.strip():
        raise RequestError(
            "continue_final_message needs a last message with a text", param="messages"
        )
    return {**message, "content": content + _END_OF_TEXT}


def _cut_at_the_mark(rendered: str) -> str:
    mark = _END_OF_TEXT.strip()
    text, found, _ = rendered.rpartition(mark)
    if not found:
        raise RequestError(
            "the model's chat template leaves the last message out, so it cannot be continued",
            param="messages",
        )
    is_trimmed = not rendered[len(text) :].startswith(_END_OF_TEXT)
    return text.rstrip() if is_trimmed else text


class _Refusal(jinja2.TemplateError):
    """What a template says when it calls `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training; here it is only text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


@cache
def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    *,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(excerpt(pay_for_text(message)))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_CHARS:
        raise BudgetError("the format of the date is too long")
    return datetime.now().strftime(format)
