"""The tools of a chat request: what a client may offer, and what an answer must be that uses them.

Knows no template and no format of answers; `tool_parsers` does.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.server.errors import HttpError, bad_request
from octavo.server.limits import Limits
from octavo.server.protocol import ChatRequest, FunctionTool, NamedToolChoice, Tool

ToolChoice = str | NamedToolChoice

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}  # OpenAI's default
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools that the model may call in its answer."""

    names: frozenset[str]
    definitions: Sequence[Mapping[str, Any]]  # as chat templates expect them
    parallel: bool  # more than one call in an answer
    schema: Mapping[str, Any] | None = None  # of the answer, where a call is forced


def offered_tools(fields: ChatRequest, limits: Limits) -> OfferedTools | None:
    """The tools of a request, checked; None where there are none, or none may be called."""
    tools = fields.tools or []
    choice = fields.tool_choice or "auto"
    definitions = definitions_of(tools, limits)
    names = frozenset(str(definition["function"]["name"]) for definition in definitions)
    _check_choice(choice, names)
    if not tools or choice == "none":
        return None
    parallel = fields.parallel_tool_calls is not False
    schema = None if choice == "auto" else tool_schema(tools, choice, parallel=parallel)
    return OfferedTools(names, definitions, parallel, schema)


def definitions_of(tools: Sequence[Tool], limits: Limits) -> list[Mapping[str, Any]]:
    """Tools, checked, as chat templates expect them."""
    functions = _functions(tools, limits)
    return [{"type": "function", "function": _definition(function)} for function in functions]


def tool_schema(
    tools: Sequence[Tool], tool_choice: ToolChoice, *, parallel: bool = True
) -> dict[str, Any]:
    """What an answer must be, as JSON schema, where `tool_choice` forces a call.

    One `{"name": …, "arguments": {…}}` for a named tool; for "required" a list of them, or one of
    any tool where calls may not be parallel. `JsonParser` reads such an answer. References within
    the parameters of a tool are led to their new place.

    Raises:
        HttpError: the choice names no tool.
    """
    functions = {tool.function.name: tool.function for tool in tools if tool.function is not None}
    _check_choice(tool_choice, functions.keys())
    if isinstance(tool_choice, NamedToolChoice):
        name = tool_choice.function.name
        return _call_schema(functions[name], "#/properties/arguments")
    if parallel:
        calls = [
            _call_schema(function, f"#/items/anyOf/{i}/properties/arguments")
            for i, function in enumerate(functions.values())
        ]
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    calls = [
        _call_schema(function, f"#/anyOf/{i}/properties/arguments")
        for i, function in enumerate(functions.values())
    ]
    return {"anyOf": calls}


def _call_schema(function: FunctionTool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": _moved(_parameters(function), place),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose root is now at `place`: references within it go with it."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference.removeprefix("#")
    return moved


def _functions(tools: Sequence[Tool], limits: Limits) -> list[FunctionTool]:
    if len(tools) > limits.max_tools:
        raise _wrong(f"at most {limits.max_tools} tools can go into one request")
    functions: dict[str, FunctionTool] = {}
    for i, tool in enumerate(tools):
        if tool.type != "function" or tool.function is None:
            raise _wrong(f"tools[{i}] must be of type function, and have a function")
        name = tool.function.name
        if not re.fullmatch(limits.tool_name_pattern, name):
            raise _wrong(
                f"tools[{i}].function.name must have 1 to 64 letters, digits, underscores or dashes"
            )
        if name in functions:
            raise _wrong(f"tools[{i}].function.name: two tools have this name")
        if limits.is_too_deep(tool.function.parameters):
            raise _wrong(f"tools[{i}].function.parameters: nested too deeply")
        functions[name] = tool.function
    if len(msgspec.json.encode(tools)) > limits.max_tools_bytes:
        raise _wrong(f"the tools have more than {limits.max_tools_bytes} bytes of JSON")
    return list(functions.values())


def _wrong(message: str) -> HttpError:
    return bad_request(message, param="tools")


def _check_choice(choice: ToolChoice, names: Collection[str]) -> None:
    if isinstance(choice, NamedToolChoice):
        if choice.function.name not in names:
            raise bad_request("tool_choice names no tool of the request", param="tool_choice")
    elif choice not in _CHOICES:
        known = ", ".join(_CHOICES)
        message = f"tool_choice must be one of {known}, or name a function"
        raise bad_request(message, param="tool_choice")
    elif choice == "required" and not names:
        raise bad_request("tool_choice required needs tools", param="tool_choice")


def _parameters(function: FunctionTool) -> Mapping[str, Any]:
    return _NO_ARGUMENTS if function.parameters is None else function.parameters


def _definition(function: FunctionTool) -> dict[str, Any]:
    """All that templates look for, in one order, so that equal tools are equal prefixes."""
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": _parameters(function),
    }
