"""The official client speaks the Responses API to a real uvicorn."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from server.helpers import CONFIG, LiveServer, serving
from server.templates import HERMES, engine_of, prompt_of
from server.test_responses import ANSWER, MODEL, TOOLS
from server.tool_texts import ROME, TWO


@pytest.fixture(scope="module")
def tool_server() -> Iterator[LiveServer]:
    with serving(engine_of(HERMES, TWO), CONFIG) as live:
        yield live


def test_the_official_client(server: LiveServer) -> None:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="Hi", instructions="Short")
        assert first.output_text.startswith("Answer 0 to: system: Short")
        assert first.usage.input_tokens_details.cached_tokens == 0
        second = client.responses.create(
            model=MODEL, input="Ho", previous_response_id=first.id, metadata={"a": "b"}
        )
        assert f"assistant: {first.output_text}" in second.output_text
        assert client.responses.retrieve(second.id).metadata == {"a": "b"}
        with client.responses.stream(model=MODEL, input="Hi") as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert final.output_text == ANSWER
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(second.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="Hi", temperature=-1)
        assert caught.value.param == "temperature"
        server.engine.script.fail_after = 4
        events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
        assert events[-1].response.error.message == "the fake engine failed as told"


async def test_the_official_client_in_the_background(server: LiveServer) -> None:
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        response = await client.responses.create(model=MODEL, input="Hi", background=True)
        while response.status in ("queued", "in_progress"):
            await asyncio.sleep(0.005)
            response = await client.responses.retrieve(response.id)
        assert response.output_text == ANSWER
        server.engine.script.token_delay_s = 0.01
        response = await client.responses.create(
            model=MODEL, input="Hi", background=True, extra_body={"ignore_eos": True}
        )
        assert (await client.responses.cancel(response.id)).status == "cancelled"
        server.engine.script.token_delay_s = 0
        stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
        deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        assert "".join(deltas) == ANSWER


def test_the_official_client_calls_tools(tool_server: LiveServer) -> None:
    url = f"{tool_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="Weather?", tools=TOOLS)
        calls = [item for item in first.output if item.type == "function_call"]
        assert [(item.name, item.arguments) for item in calls] == [
            ("weather", ROME),
            ("time", "{}"),
        ]
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
            for item in calls
        ]
        client.responses.create(
            model=MODEL, input=results, previous_response_id=first.id, tools=TOOLS
        )
        prompt = prompt_of(tool_server.engine)
        assert prompt.endswith(
            f"tool: sun from weather for {calls[0].call_id}\n"
            f"tool: sun from time for {calls[1].call_id}\nassistant: "
        )
        # The same without the store: the client sends its own items back.
        history = [{"role": "user", "content": "Weather?"}, *first.output, *results]
        client.responses.create(model=MODEL, input=history, store=False, tools=TOOLS)
        assert prompt_of(tool_server.engine) == prompt
        with client.responses.stream(model=MODEL, input="Weather?", tools=TOOLS) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
    streamed = [item.arguments for item in final.output if item.type == "function_call"]
    assert streamed == [ROME, "{}"]
