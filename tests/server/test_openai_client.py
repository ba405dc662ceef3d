"""The official client against a real uvicorn on a free port: what users' code does, works."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from server.helpers import LiveServer


@pytest.fixture
def sync_client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        yield client


MODEL = "fake-model"
MESSAGES = [{"role": "user", "content": "Hi"}]
ANSWER = "Answer 0 to: user: Hi\nassistant: "


def test_models(sync_client: openai.OpenAI) -> None:
    assert [model.id for model in sync_client.models.list()] == [MODEL]
    assert sync_client.models.retrieve(MODEL).owned_by == "octavo"


def test_chat(sync_client: openai.OpenAI) -> None:
    response = sync_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in response.choices] == [0, 1]
    first = response.choices[0]
    assert (first.message.content, first.message.role) == (ANSWER, "assistant")
    assert first.finish_reason == "stop"
    assert first.logprobs.content[0].token == "A"
    assert [top.token for top in first.logprobs.content[0].top_logprobs] == ["A", "B"]
    assert response.usage.completion_tokens == 2 * (len(ANSWER) + 1)
    assert response.usage.total_tokens == response.usage.prompt_tokens + 2 * (len(ANSWER) + 1)


def test_chat_stream(sync_client: openai.OpenAI) -> None:
    stream = sync_client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=12,
    )
    texts = ["", ""]
    roles, reasons, usages = [], [], []
    for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == ["Answer 0 to:", "Answer 1 to:"]
    assert roles == ["assistant"] * 2
    assert reasons == ["length"] * 2
    *before, last = usages
    assert before == [None] * len(before)
    assert last.completion_tokens == 24


async def test_async_chat(async_client: openai.AsyncOpenAI) -> None:
    response = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stop=["user"], temperature=0, seed=7
    )
    assert response.choices[0].message.content == "Answer 0 to: "
    stream = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stop=["user"], stream=True, logprobs=True
    )
    text, tokens = "", []
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            tokens += choice.logprobs.content if choice.logprobs else []
    assert text == "Answer 0 to: "
    assert tokens[0].token == "A"


def test_completion(sync_client: openai.OpenAI) -> None:
    response = sync_client.completions.create(
        model=MODEL, prompt=["Hi", "Ho"], max_tokens=20, logprobs=1, extra_body={"top_k": 5}
    )
    assert [c.text for c in response.choices] == ["Answer 0 to: Hi", "Answer 0 to: Ho"]
    assert response.choices[0].logprobs.tokens[:2] == ["A", "n"]
    assert response.usage.prompt_tokens == 6


async def test_async_completion(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.completions.create(
        model=MODEL, prompt="Hi", stream=True, echo=True, stop="to"
    )
    pieces = [chunk.choices[0] async for chunk in stream]
    assert "".join(piece.text for piece in pieces) == "HiAnswer 0 "
    assert pieces[-1].finish_reason == "stop"


def test_errors_have_their_classes(server: LiveServer, sync_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sync_client.completions.create(model="gpt-9", prompt="Hi")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        sync_client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    server.engine.script.max_requests = 0
    with pytest.raises(openai.InternalServerError) as caught:
        sync_client.completions.create(model=MODEL, prompt="Hi", stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")


def test_failure_in_mid_stream(server: LiveServer, sync_client: openai.OpenAI) -> None:
    server.engine.script.fail_after = 4
    server.engine.script.token_delay_s = 0.001
    stream = sync_client.completions.create(model=MODEL, prompt="Hi", stream=True)
    text = ""
    with pytest.raises(openai.APIError, match="failed as told"):
        for chunk in stream:
            text += chunk.choices[0].text
    assert text == "Answ"
