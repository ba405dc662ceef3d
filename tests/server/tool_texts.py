"""Answers that call tools, as models write them."""

import json
from typing import Any

NAMES = frozenset({"weather", "time"})


def call(name: str = "weather", arguments: Any = None, key: str = "arguments") -> str:
    value = {"city": "Rome"} if arguments is None else arguments
    return json.dumps({"name": name, key: value})


def marked(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


ROME = '{"city": "Rome"}'
TWO = f"Let me see.\n{marked(call())}\n{marked(call('time', {}))}"
