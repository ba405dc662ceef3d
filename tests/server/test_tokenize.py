"""POST /tokenize for conversations: the ids are those that chat completions give the engine."""

from typing import Any

import httpx
import pytest
from server.helpers import client_of
from server.templates import HERMES, PLAIN, QWEN3, TemplateTokenizer

from octavo.engine import ServedModel
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine

TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
HELLO = [{"role": "user", "content": "Hello"}]
SAYING = [*HELLO, {"role": "assistant", "content": "It is "}]
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": HELLO},
    "tools": {"messages": HELLO, "tools": [TOOL]},
    "no tools": {"messages": HELLO, "tools": []},
    "arguments": {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}},
    "without a prompt": {"messages": SAYING, "add_generation_prompt": False},
    "continued": {
        "messages": SAYING,
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two ends": ({"continue_final_message": True}, "continue_final_message"),
    "too many tools": ({"tools": [TOOL] * 200}, "tools"),
    "twice the same": ({"tools": [TOOL, TOOL]}, "tools"),
    "another kind": ({"tools": [{"type": "search"}]}, "tools"),
    "too large": (
        {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 2**18}}]},
        "tools",
    ),
    "a reserved name": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    "too much": ({"chat_template_kwargs": {"a": "x" * 2**17}}, "chat_template_kwargs"),
}


def engine_with(source: str) -> FakeEngine:
    engine, tokenizer = FakeEngine(), TemplateTokenizer(source)
    engine.model = ServedModel(engine.name, 4096, tokenizer.vocab_size, tokenizer)
    return engine


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
async def test_the_ids_are_those_of_chat_completions(chat: dict[str, Any]) -> None:
    engine = engine_with(QWEN3)
    client: httpx.AsyncClient
    async with client_of(engine, ServerConfig()) as client:
        tokens = (await client.post("/tokenize", json=chat)).json()["tokens"]
        response = await client.post("/v1/chat/completions", json=chat | {"max_tokens": 1})
    assert response.status_code == 200, response.text
    [(asked, _)] = engine.received.values()
    assert tokens == asked
    text = engine.model.tokenizer.decode(tokens)
    assert ('"name": "now"' in text) == bool(chat.get("tools"))
    assert text.endswith("It is ") == bool(chat.get("continue_final_message"))


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG)
async def test_the_limits_are_those_of_chat_completions(
    path: str, fields: dict[str, Any], param: str
) -> None:
    client: httpx.AsyncClient
    async with client_of(engine_with(HERMES), ServerConfig()) as client:
        response = await client.post(path, json={"messages": SAYING} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_tools_that_a_template_does_not_write_are_refused() -> None:
    client: httpx.AsyncClient
    async with client_of(engine_with(PLAIN), ServerConfig()) as client:
        response = await client.post("/tokenize", json={"messages": HELLO, "tools": [TOOL]})
    assert response.json()["error"]["code"] == "unsupported_parameter"
