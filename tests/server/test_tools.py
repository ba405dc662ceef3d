"""Tools: what is offered reaches the template, and calls come back, whole or streamed."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server.helpers import CONFIG, LiveServer, client_of, serving
from server.templates import HERMES, LLAMA, PLAIN, QWEN3, engine_of, prompt_of
from server.tool_texts import ROME, TWO, call, marked

from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.server.errors import HttpError
from octavo.server.protocol import FunctionName, FunctionTool, NamedToolChoice, Tool
from octavo.server.tools import tool_schema

CHAT = "/v1/chat/completions"
MODEL = "fake-model"
MESSAGES = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "time"}}
BODY = {"messages": MESSAGES, "tools": [TOOL, TIME]}


async def events(client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(CHAT, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    frames = response.text.split("\n\n")[:-2]
    return [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]


@pytest.mark.parametrize(
    ("template", "reply", "content"),
    [
        (HERMES, TWO, "Let me see."),
        (LLAMA, f"[{call()}, {call('time', {})}]", None),
    ],
)
async def test_a_response_with_calls(template: str, reply: str, content: str | None) -> None:
    engine = engine_of(template, reply)
    async with client_of(engine) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
        message = choice["message"]
        assert (choice["finish_reason"], message["content"]) == ("tool_calls", content)
        ids = [each.pop("id") for each in message["tool_calls"]]
        assert len({*ids}) == 2 and all(name.startswith("call_") for name in ids)
        assert message["tool_calls"] == [
            {"type": "function", "function": {"name": "weather", "arguments": ROME}},
            {"type": "function", "function": {"name": "time", "arguments": "{}"}},
        ]
        assert f'"parameters": {json.dumps(PARAMETERS)}' in prompt_of(engine)


async def test_a_stream_with_calls() -> None:
    async with client_of(engine_of(HERMES, TWO)) as client:
        choices = await events(client, BODY)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    heads = [piece for piece in pieces if "id" in piece]
    assert [(head["index"], head["type"], head["function"]) for head in heads] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "time", "arguments": ""}),
    ]
    arguments = [piece["function"]["arguments"] for piece in pieces if piece["index"] == 0]
    assert "".join(arguments) == ROME
    assert len(arguments) == 1 + len(ROME)  # a token each, as they came
    assert deltas[-1] == {} and choices[-1]["finish_reason"] == "tool_calls"


async def test_at_most_one_call_where_they_may_not_be_parallel() -> None:
    async with client_of(engine_of(HERMES, TWO)) as client:
        body = BODY | {"parallel_tool_calls": False}
        [choice] = (await client.post(CHAT, json=body)).json()["choices"]
        assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
        deltas = [choice["delta"] for choice in await events(client, body)]
        pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
        assert {piece["index"] for piece in pieces} == {0}


@pytest.mark.parametrize("extra", [{"logprobs": True}, {"return_token_ids": True}])
async def test_every_token_keeps_its_place_in_a_stream(extra: dict[str, Any]) -> None:
    async with client_of(engine_of(HERMES, TWO)) as client:
        [whole] = (await client.post(CHAT, json=BODY | extra)).json()["choices"]
        choices = await events(client, BODY | extra)
    if "logprobs" in extra:
        parts = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        expected = whole["logprobs"]["content"]
    else:
        parts = [choice["token_ids"] for choice in choices]
        expected = whole["token_ids"]
    assert [entry for part in parts for entry in part] == expected
    assert len(expected) == len(TWO) + 1


async def test_an_answer_that_was_cut_says_so() -> None:
    async with client_of(engine_of(HERMES, TWO)) as client:
        body = BODY | {"max_tokens": len(TWO) - 5}
        [choice] = (await client.post(CHAT, json=body)).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert len(choice["message"]["tool_calls"]) == 1
        assert choice["message"]["content"].endswith(call("time", {}) + "\n</tool_")
        assert (await events(client, body))[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("choice", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
async def test_calls_are_text_where_none_may_be_made(choice: dict[str, Any]) -> None:
    engine = engine_of(HERMES, TWO)
    async with client_of(engine) as client:
        [answer] = (await client.post(CHAT, json=BODY | choice)).json()["choices"]
    assert answer["message"] == {"role": "assistant", "content": TWO, "refusal": None}
    assert answer["finish_reason"] == "stop"
    assert "tools: " not in prompt_of(engine)


async def test_calls_and_their_results_reach_the_template() -> None:
    calls = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": arguments},
        }
        for arguments in (ROME, "no JSON", "")
    ]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
    ]
    engine = engine_of(HERMES)
    async with client_of(engine) as client:
        response = await client.post(CHAT, json=BODY | {"messages": messages})
        assert response.status_code == 200, response.text
    written = "".join(
        f"<tool_call>{json.dumps({'name': 'weather', 'arguments': arguments})}</tool_call>"
        for arguments in ({"city": "Rome"}, "no JSON", {})
    )
    end = f"user: Weather?\nassistant: {written}\ntool: sun from weather for call_1\nassistant: "
    assert prompt_of(engine).endswith(end)


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


def function(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": function(name="")}, "tools"),
    ({"tools": function(name="a b")}, "tools"),
    ({"tools": function(name="f\n")}, "tools"),
    ({"tools": function(name="x" * 65)}, "tools"),
    ({"tools": function(parameters=nested(33))}, "tools"),
    ({"tools": function(description="x" * 2**18)}, "tools"),
    ({"tools": [function(name=f"f{i}")[0] for i in range(129)]}, "tools"),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "rain"}}}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": {"function": {}}}, "tool_choice.function.name"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages[0].tool_calls"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": nested(33)}}],
                }
            ]
        },
        "messages[0].tool_calls",
    ),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
async def test_wrong_tools_are_refused(fields: dict[str, Any], param: str) -> None:
    engine = engine_of(HERMES)
    config = ServerConfig(max_request_bytes=2**20)
    async with client_of(engine, config) as client:
        response = await client.post(CHAT, json=BODY | fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert len(error["message"]) < 200
    assert not engine.received


async def test_the_longest_names_and_deepest_schemas_pass() -> None:
    engine = engine_of(HERMES)
    async with client_of(engine) as client:
        for tools in (function(name="x" * 64), function(parameters=nested(32))):
            response = await client.post(CHAT, json=BODY | {"tools": tools})
            assert response.status_code == 200, response.text


async def test_a_template_without_tools_refuses_them() -> None:
    async with client_of(engine_of(PLAIN, call())) as client:
        response = await client.post(CHAT, json=BODY)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == "tools" and "--tool-call-parser" in error["message"]
        response = await client.post(CHAT, json=BODY | {"tool_choice": "none"})
        assert response.json()["choices"][0]["message"]["content"] == call()
    config = ServerConfig(tool_call_parser="json")
    async with client_of(engine_of(PLAIN, call()), config) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"


async def test_the_operator_chooses_the_parser() -> None:
    async with client_of(
        engine_of(HERMES, call()), ServerConfig(tool_call_parser="json")
    ) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
    with pytest.raises(ConfigError, match="hermes"):
        ServerConfig(tool_call_parser="llama")


async def test_calls_are_looked_for_after_the_reasoning() -> None:
    reply = f"<think>I could {marked(call('time', {}))}\n</think>\n\n{marked(call())}"
    async with client_of(engine_of(QWEN3, reply)) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
        message = choice["message"]
        assert message["reasoning_content"] == f"I could {marked(call('time', {}))}"
        assert message["content"] is None
        assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather"]


TOOLS = [
    Tool("function", FunctionTool("f", parameters={"$ref": "#/$defs/a", "$defs": {"a": {}}})),
    Tool("function", FunctionTool("g")),
]


def test_the_schema_of_a_forced_call() -> None:
    def schema(name: str, arguments: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }

    nothing = {"type": "object", "properties": {}}
    named = NamedToolChoice(FunctionName("g"))
    assert tool_schema(TOOLS, named) == schema("g", nothing)

    def f_at(place: str) -> dict[str, Any]:
        return schema("f", {"$ref": f"{place}/properties/arguments/$defs/a", "$defs": {"a": {}}})

    assert tool_schema(TOOLS, NamedToolChoice(FunctionName("f"))) == f_at("#")
    assert tool_schema(TOOLS, "required") == {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [f_at("#/items/anyOf/0"), schema("g", nothing)]},
    }
    one = {"anyOf": [f_at("#/anyOf/0"), schema("g", nothing)]}
    assert tool_schema(TOOLS, "required", parallel=False) == one
    with pytest.raises(HttpError, match="names no tool"):
        tool_schema(TOOLS, NamedToolChoice(FunctionName("h")))


@pytest.fixture(scope="module")
def tool_server() -> Iterator[LiveServer]:
    with serving(engine_of(HERMES, TWO), CONFIG) as live:
        yield live


def test_the_official_client(tool_server: LiveServer) -> None:
    url = f"{tool_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL, TIME])
        message = whole.choices[0].message
        assert whole.choices[0].finish_reason == "tool_calls"
        assert [c.function.name for c in message.tool_calls] == ["weather", "time"]
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}
        answers = [
            {"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in message.tool_calls
        ]
        again = client.chat.completions.create(
            model=MODEL, messages=[*MESSAGES, message, *answers], tools=[TOOL, TIME]
        )
        assert again.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=[TOOL, TIME]
        ) as stream:
            final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "Let me see.")
    told = [(c.function.name, c.function.arguments) for c in final.message.tool_calls]
    assert told == [("weather", ROME), ("time", "{}")]
