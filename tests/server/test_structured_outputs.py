"""What clients say of an answer's shape: how it reaches the engine, and what is refused."""

import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server.helpers import CONFIG, client_of
from server.templates import HERMES, R1, engine_of

from octavo.core import StructuredOutputsParams
from octavo.testing.fake_engine import FakeEngine

CHAT, COMPLETIONS, TGI = "/v1/chat/completions", "/v1/completions", "/generate"
RESPONSES, KSERVE = "/v1/responses", "/v2/models/fake-model/generate"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    prompts = {
        CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
        COMPLETIONS: {"prompt": "Hi"},
        TGI: {"inputs": "Hi"},
        RESPONSES: {"input": "Hi"},
        KSERVE: {"text_input": "Hi"},
    }
    return prompts[path] | fields


def shape_in(engine: FakeEngine) -> StructuredOutputsParams | None:
    _, sampling = list(engine.received.values())[-1]
    return sampling.structured_outputs


ASKED = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"json": SCHEMA},
    ),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    (
        {"structured_outputs": {"json": '{"type": "null"}', "disable_any_whitespace": True}},
        {"json": '{"type": "null"}', "disable_any_whitespace": True},
    ),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"grammar": 'root ::= "x"'}}, {"grammar": 'root ::= "x"'}),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "expected"), ASKED, ids=lambda value: str(value)[:50])
async def test_a_shape_reaches_the_engine(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    fields: dict[str, Any],
    expected: dict[str, Any] | None,
) -> None:
    response = await client.post(path, json=body_of(path, **fields))
    assert response.status_code == 200, response.text
    wanted = None if expected is None else StructuredOutputsParams(**expected)
    assert shape_in(engine) == wanted


async def test_tgis_grammars(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for given, expected in (
        ({"type": "json", "value": SCHEMA}, {"json": SCHEMA}),
        ({"type": "regex", "value": "a|b"}, {"regex": "a|b"}),
    ):
        body = body_of(TGI, parameters={"grammar": given})
        assert (await client.post(TGI, json=body)).status_code == 200
        assert shape_in(engine) == StructuredOutputsParams(**expected)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


WRONG = [
    ({"response_format": {"type": "xml"}}, "text, json_object or json_schema"),
    ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "json_schema.schema",
    ),
    ({"response_format": 3}, "response_format"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "give one",
    ),
    ({"structured_outputs": {}}, "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
    ({"structured_outputs": {"regex": "["}}, "invalid"),
    ({"structured_outputs": {"regex": "(" * 5000 + ")" * 5000}}, "too complex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
    ({"structured_outputs": {"json": {"type": "nope"}}}, "nope"),
    ({"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}}, "the shape of the answer"),
    ({"structured_outputs": {"json": deep(60)}}, "nested"),
    ({"structured_outputs": {"grammar": "start: nope"}}, "nope"),
    ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 2}, "min_tokens"),
    ({"structured_outputs": {"choice": ["a"]}, "use_beam_search": True}, "use_beam_search"),
    ({"guided_json": SCHEMA}, "use structured_outputs"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_f22_shapes_that_cannot_be_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], words: str
) -> None:
    start = time.monotonic()
    response = await client.post(path, json=body_of(path, **fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"] and len(error["message"]) < 500
    assert error["type"] == "invalid_request_error"
    assert time.monotonic() - start < 10, "it is compiled within bounds"
    assert not engine.live


BAD = {"type": "nothing"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}
NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": (CHAT, {"response_format": "schema"}, "response_format"),
    "completion": (COMPLETIONS, {"response_format": "schema"}, "response_format"),
    "own field": (CHAT, {"structured_outputs": {"json": BAD}}, "structured_outputs"),
    "too deep": (CHAT, {"structured_outputs": {"json": deep(60)}}, "structured_outputs"),
    "too large": (COMPLETIONS, {"response_format": "large"}, "response_format"),
    "tools": (CHAT, {"tools": "bad", "tool_choice": "required"}, "tools"),
    "responses": (RESPONSES, {"text": "schema"}, "text.format"),
    "tools of responses": (RESPONSES, {"tools": "bad", "tool_choice": "required"}, "tools"),
    "kserve": (KSERVE, {"parameters": {"response_format": FORMAT}}, "response_format"),
    "tgi": (TGI, {"parameters": {"grammar": {"type": "json", "value": BAD}}}, "parameters.grammar"),
}
LARGE = {"type": "object", "description": "x" * 2**18}


def spelled(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what the words in them stand for, as the surface spells it."""
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"a": BAD}}}
    of_responses = path == RESPONSES
    meant = {
        "schema": FORMAT,
        "large": {"type": "json_schema", "json_schema": {"name": "x", "schema": LARGE}},
        "bad": [{"type": "function"} | (tool if of_responses else {"function": tool})],
    }
    if of_responses:
        meant["schema"] = {"format": {"type": "json_schema", "name": "x", "schema": BAD}}
    return {name: meant.get(str(value), value) for name, value in fields.items()}


@pytest.mark.parametrize(("path", "fields", "param"), NAMED.values(), ids=NAMED)
async def test_f21_what_is_wrong_with_a_shape_names_the_field_that_it_came_in(
    path: str, fields: dict[str, Any], param: str
) -> None:
    engine = engine_of(HERMES)
    async with client_of(engine, replace(CONFIG, max_request_bytes=2**20)) as client:
        response = await client.post(path, json=body_of(path, **spelled(path, fields)))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    if param != "structured_outputs":
        assert "structured_outputs" not in error["message"]
    assert not engine.live


@pytest.mark.parametrize(
    "regex", ["(a+)+$", ".{1,99999}", "(x+x+)+y", "(?:a?){30}a{30}", "(.*){1,300}x.{1,200}"]
)
async def test_f22_evil_expressions_are_taken_and_cost_nothing(
    client: httpx.AsyncClient, regex: str
) -> None:
    body = body_of(COMPLETIONS, structured_outputs={"regex": regex})
    assert (await client.post(COMPLETIONS, json=body)).status_code == 200


CHOICES = [
    ("required", {"type": "array", "minItems": 1}),
    ({"type": "function", "function": {"name": "weather"}}, {"type": "object"}),
]


@pytest.mark.parametrize(("choice", "part"), CHOICES)
async def test_a_forced_call_is_a_shape(choice: object, part: dict[str, Any]) -> None:
    engine = engine_of(HERMES, '[{"name": "weather", "arguments": {"city": "Rome"}}]')
    async with client_of(engine) as client:
        body = body_of(CHAT, tools=[TOOL], tool_choice=choice)
        response = await client.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        shape = shape_in(engine)
        assert shape is not None and part.items() <= shape.json.items()
        [answer] = response.json()["choices"]
        [call] = answer["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
        assert answer["finish_reason"] == "tool_calls", "read as JSON whatever the model's own form"
        refused = await client.post(CHAT, json=body | {"response_format": {"type": "json_object"}})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


async def test_a_shape_begins_behind_reasoning_that_the_template_opens() -> None:
    engine = engine_of(R1, "Hm.</think>{}")
    async with client_of(engine) as client:
        body = body_of(CHAT, response_format={"type": "json_object"})
        message = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "{}")
    assert shape_in(engine) == StructuredOutputsParams(json_object=True, after="</think>")
