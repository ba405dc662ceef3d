"""The official client against a real uvicorn on a free port: what users' code does, works."""

import base64
from array import array
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


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings(sync_client: openai.OpenAI, encoding: str | None) -> None:
    more = {} if encoding is None else {"encoding_format": encoding}  # None: it takes base64 itself
    response = sync_client.embeddings.create(
        model=MODEL, input=["Hi", "Hello"], user="me", extra_body={"pooling": "mean"}, **more
    )
    ends = [b"Hi", b"Hello"]
    expected = [[float(len(end) + 1), 256.0, float(end[-1])] for end in ends]  # with BOS
    if encoding == "base64":
        texts = [item.embedding for item in response.data]
        found = [array("f", base64.b64decode(text)).tolist() for text in texts]  # type: ignore[arg-type]
    else:
        found = [item.embedding for item in response.data]
    assert found == expected
    assert [item.index for item in response.data] == [0, 1]
    assert response.usage.prompt_tokens == response.usage.total_tokens == 9
    with pytest.raises(openai.BadRequestError, match="Matryoshka") as caught:
        sync_client.embeddings.create(model=MODEL, input="Hi", dimensions=2)
    assert caught.value.param == "dimensions"


async def test_async_embeddings(async_client: openai.AsyncOpenAI) -> None:
    response = await async_client.embeddings.create(model=MODEL, input=[[72, 105], [33]])
    assert [item.embedding for item in response.data] == [[2.0, 72.0, 105.0], [1.0, 33.0, 33.0]]


def test_prompt_logprobs(sync_client: openai.OpenAI) -> None:
    response = sync_client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = response.choices[0].logprobs
    assert response.choices[0].text == "Hi"
    assert logprobs.tokens[1:] == ["H", "i"]
    assert logprobs.token_logprobs == [None, -0.25, -0.25]


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
