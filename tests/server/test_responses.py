"""The Responses API: documents, typed events, the store, and what runs without a reader."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from server.helpers import client_of
from server.templates import HERMES, PLAIN, QWEN3, engine_of, prompt_of
from server.tool_texts import ROME, TWO, call, marked

from octavo.testing.fake_engine import FakeEngine

URL = "/v1/responses"
MODEL = "fake-model"
ANSWER = "Answer 0 to: user: Hi\nassistant: "
TOOLS = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}},
    {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}},
]

Event = dict[str, Any]


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"input": "Hi"} | fields)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def refused(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"input": "Hi"} | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def events_of(client: httpx.AsyncClient, **fields: Any) -> list[Event]:
    response = await client.post(URL, json={"input": "Hi", "stream": True} | fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for frame in response.text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def ended(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    """A background response, once it runs no more."""
    for _ in range(300):
        document = (await client.get(f"{URL}/{response_id}")).json()
        if document["status"] not in ("queued", "in_progress"):
            return document
        await asyncio.sleep(0.01)
    raise AssertionError("it does not end")


def nameless(value: Any) -> Any:
    """The same without what differs from response to response."""
    if isinstance(value, list):
        return [nameless(item) for item in value]
    if isinstance(value, dict):
        names = ("id", "item_id", "call_id", "created_at", "completed_at", "sequence_number")
        return {name: nameless(item) for name, item in value.items() if name not in names}
    return value


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message(text: str, status: str = "completed") -> dict[str, Any]:
    content = [text_part(text)]
    return {"type": "message", "status": status, "role": "assistant", "content": content}


async def test_a_response(client: httpx.AsyncClient) -> None:
    document = await create(client, temperature=0.5, metadata={"a": "b"}, max_output_tokens=999)
    assert nameless(document["output"]) == [message(ANSWER)]
    assert (document["object"], document["status"]) == ("response", "completed")
    assert document["error"] is document["incomplete_details"] is None
    shown = {"temperature": 0.5, "metadata": {"a": "b"}, "max_output_tokens": 999, "store": True}
    assert shown.items() <= document.items()
    num_input = 1 + len("user: Hi\nassistant: ")  # and one where the text begins
    assert document["usage"] == {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": len(ANSWER) + 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + len(ANSWER) + 1,
    }
    assert (await client.get(f"{URL}/{document['id']}")).json() == document


async def test_an_answer_that_was_cut_is_incomplete(client: httpx.AsyncClient) -> None:
    document = await create(client, max_output_tokens=6)
    assert nameless(document["output"]) == [message("Answer", "incomplete")]
    assert document["status"] == "incomplete"
    assert document["incomplete_details"] == {"reason": "max_output_tokens"}
    last = (await events_of(client, max_output_tokens=6))[-1]
    assert last["type"] == "response.incomplete"
    assert nameless(last["response"]) == nameless(document)


async def test_the_events_of_a_text(client: httpx.AsyncClient) -> None:
    events = await events_of(client, max_output_tokens=3, stop="x")
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = ["output_text.delta"] * 3
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["A", "n", "s"]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == []


async def test_the_events_add_up_to_the_document() -> None:
    reply = f"<think>\nWell\n</think>\n\n{TWO}"
    async with client_of(engine_of(QWEN3, reply)) as client:
        document = await create(client, tools=TOOLS)
        events = await events_of(client, tools=TOOLS)
    thought, said, weather, clock = nameless(document["output"])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Well"}]
    assert said == message("Let me see.")
    assert weather == {
        "type": "function_call",
        "status": "completed",
        "name": "weather",
        "arguments": ROME,
    }
    assert (clock["name"], clock["arguments"]) == ("time", "{}")
    assert document["usage"]["output_tokens_details"]["reasoning_tokens"] == len("Well")
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert nameless(done) == nameless(document["output"])
    last = events[-1]
    assert last["type"] == "response.completed" and last["response"]["output"] == done
    assert nameless(last["response"]) == nameless(document)
    for index, item in enumerate(done):
        own = [event for event in events if event.get("item_id") == item["id"]]
        assert {event["output_index"] for event in own} == {index}
        deltas = "".join(event.get("delta", "") for event in own)
        content = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert deltas == content


async def test_a_call_that_breaks_off_is_incomplete_in_a_stream() -> None:
    reply = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
    async with client_of(engine_of(HERMES, reply)) as client:
        whole = await create(client, tools=TOOLS)
        assert [item["type"] for item in whole["output"]] == ["message"]
        events = await events_of(client, tools=TOOLS)
        output = events[-1]["response"]["output"]
        assert output[0]["type"] == "function_call" and output[0]["status"] == "incomplete"
        done = "response.function_call_arguments.done"
        assert done not in [event["type"] for event in events]
        # A conversation goes on without it.
        again = {"previous_response_id": events[-1]["response"]["id"], "tools": TOOLS}
        assert (await create(client, **again))["status"] == "completed"


async def test_the_shape_of_an_answer_is_that_of_a_chat() -> None:
    engine = engine_of(HERMES, json.dumps({"name": "weather", "arguments": {}}))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    async with client_of(engine) as client:
        document = await create(client, text={"format": form})
        assert document["text"]["format"] == form | {"description": None}
        [(_, sampling)] = engine.received.values()
        assert sampling.structured_outputs.json == schema
        choice = {"type": "function", "name": "weather"}
        document = await create(client, tools=TOOLS, tool_choice=choice)
        assert document["tool_choice"] == choice
        [item] = document["output"]
        assert (item["type"], item["name"], item["arguments"]) == ("function_call", "weather", "{}")


INPUTS: list[tuple[Any, str]] = [
    ("Hi", "user: Hi\n"),
    ([{"role": "user", "content": "Hi"}], "user: Hi\n"),
    (
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be kind"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        ],
        "system: Be kind\nuser: Hi\n",
    ),
    (
        [
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "assistant", "content": [text_part("Let me see.")]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ROME},
            {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "noon"}],
            },
        ],
        "user: Weather?\nassistant: Let me see."
        f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>'
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>\n'
        "tool: sun from weather for c1\ntool: noon from time for c2\n",
    ),
]


@pytest.mark.parametrize(("given", "prompt"), INPUTS)
async def test_items_become_messages(given: Any, prompt: str) -> None:
    engine = engine_of(HERMES, "Ok")
    async with client_of(engine) as client:
        await create(client, input=given)
        assert prompt_of(engine) == f"{prompt}assistant: "
        await create(client, input=given, instructions="Short")
        assert prompt_of(engine) == f"system: Short\n{prompt}assistant: "


async def test_a_conversation_goes_on_without_the_instructions() -> None:
    engine = engine_of(HERMES, marked(call()))
    async with client_of(engine) as client:
        first = await create(client, instructions="Short", tools=TOOLS)
        [item] = first["output"]
        result = {"type": "function_call_output", "call_id": item["call_id"], "output": "sun"}
        engine.script.reply = lambda prompt, index: "It shines."
        second = await create(client, input=[result], previous_response_id=first["id"])
        called = f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>'
        before = f"user: Hi\nassistant: {called}\ntool: sun from weather for {item['call_id']}\n"
        assert prompt_of(engine) == f"{before}assistant: "
        await create(client, input="Thanks", previous_response_id=second["id"])
        assert prompt_of(engine) == (f"{before}assistant: It shines.\nuser: Thanks\nassistant: ")
        assert second["previous_response_id"] == first["id"]


async def test_a_conversation_needs_a_stored_response_that_has_ended() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        unstored = await create(client, store=False)
        assert (await client.get(f"{URL}/{unstored['id']}")).status_code == 404
        for previous_id in (unstored["id"], "resp_x"):
            error = await refused(client, previous_response_id=previous_id)
            assert error["code"] == "previous_response_not_found"
        engine.script.queue_delay_s = 60
        running = await create(client, background=True)
        error = await refused(client, previous_response_id=running["id"])
        assert error["param"] == "previous_response_id" and "queued" in error["message"]
        await client.post(f"{URL}/{running['id']}/cancel")
        error = await refused(client, previous_response_id=running["id"])
        assert "cancelled" in error["message"]


async def test_truncation_drops_whole_turns_from_the_front() -> None:
    engine = engine_of(PLAIN, "Ok")
    engine.max_model_len = 200
    turns = [
        {"role": role, "content": f"{i} {role} ".ljust(30, "x")}
        for i in range(5)
        for role in ("user", "assistant")
    ]
    fields: dict[str, Any] = {
        "instructions": "Short",
        "input": [*turns, {"role": "user", "content": "Last"}],
        "max_output_tokens": 20,
    }
    engine.model = type(engine.model)(
        engine.name, 200, engine.model.vocab_size, engine.model.tokenizer
    )
    async with client_of(engine) as client:
        assert (await refused(client, **fields))["code"] == "context_length_exceeded"
        await create(client, **fields, truncation="auto")
        prompt = prompt_of(engine)
        assert prompt.startswith("system: Short\nuser: 4 user") and "3 " not in prompt
        assert len(prompt) <= 180
        await create(client, truncation="auto")  # what fits is left whole
        assert prompt_of(engine) == "user: Hi\nassistant: "
        error = await refused(client, input="x" * 300, truncation="auto")
        assert error["code"] == "context_length_exceeded"


async def test_the_background(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.script.queue_delay_s = 0.05
    engine.script.token_delay_s = 0.001
    document = await create(client, background=True)
    assert (document["status"], document["output"]) == ("queued", [])
    seen = set()
    while (found := (await client.get(f"{URL}/{document['id']}")).json())["usage"] is None:
        seen.add(found["status"])
        await asyncio.sleep(0.005)
    assert seen == {"queued", "in_progress"}
    assert found["status"] == "completed" and nameless(found["output"]) == [message(ANSWER)]
    cancelled = await client.post(f"{URL}/{document['id']}/cancel")  # too late
    assert cancelled.json() == found


async def test_cancelling(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.script.token_delay_s = 0.005
    document = await create(client, background=True, ignore_eos=True)
    while not (await client.get(f"{URL}/{document['id']}")).json()["output"]:
        await asyncio.sleep(0.005)
    response = await client.post(f"{URL}/{document['id']}/cancel")
    assert response.json()["status"] == "cancelled"
    assert not engine.live and engine.aborted
    assert response.json()["output"][0]["status"] == "incomplete"
    assert (await client.get(f"{URL}/{document['id']}")).json() == response.json()
    # With a reader, to go away is to cancel.
    whole = await create(client, max_output_tokens=3)
    response = await client.post(f"{URL}/{whole['id']}/cancel")
    assert response.status_code == 400 and "background" in response.json()["error"]["message"]


async def test_deleting(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.script.token_delay_s = 0.005
    for fields in ({}, {"background": True, "ignore_eos": True}):
        document = await create(client, **fields)
        url = f"{URL}/{document['id']}"
        gone = {"id": document["id"], "object": "response", "deleted": True}
        assert (await client.delete(url)).json() == gone
        assert not engine.live
        for method, path in (("GET", url), ("DELETE", url), ("POST", f"{url}/cancel")):
            assert (await client.request(method, path)).status_code == 404


async def test_failures_are_told(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.script.fail_after = 4
    last = (await events_of(client))[-1]
    assert last["type"] == "response.failed"
    told = {"code": "generation_failed", "message": "the fake engine failed as told"}
    assert last["response"]["error"] == told
    assert nameless(last["response"]["output"]) == [message("Answ", "incomplete")]
    stored = (await client.get(f"{URL}/{last['response']['id']}")).json()
    assert stored == last["response"]
    document = await ended(client, (await create(client, background=True))["id"])
    assert (document["status"], document["error"]) == ("failed", told)
    engine.script.max_requests = 0
    for background in (False, True):  # told at once, and not by a response that fails
        response = await client.post(URL, json={"input": "Hi", "background": background})
        assert response.status_code == 503 and response.headers["retry-after"] == "2"
        assert response.json()["error"]["code"] == "overloaded"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input[0].content[0].file_id",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
    ),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    (
        {
            "input": [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 99}
                | {"arguments": '{"a":' * 40 + "1" + "}" * 40}
            ]
        },
        "input",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 1000}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "function", "name": "rain"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {"a": "x" * 513}}, "metadata"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"truncation": "some"}, "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"background": True, "store": False}, "background"),
    ({"background": True, "stream": True}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"priority": "x"}, "priority"),
    ({"deadline_ms": -1}, "deadline_ms"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
async def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    engine = engine_of(HERMES)
    async with client_of(engine) as client:
        error = await refused(client, **fields)
    assert error["param"] == param, error
    assert "messages" not in error["message"] and ".function" not in error["message"]
    assert not engine.received


async def test_what_has_no_effect_passes(client: httpx.AsyncClient) -> None:
    fields = {
        "reasoning": {"effort": "low"},
        "include": [],
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "service_tier": "auto",
        "user": "me",
        "prompt_cache_key": "x",
        "max_tool_calls": 3,
        "stream_options": None,
    }
    document = await create(client, **fields)
    assert document["reasoning"] == {"effort": "low"}
    response = await client.get(f"{URL}/{document['id']}?stream=true")
    assert response.json()["error"]["param"] == "stream"
