"""`octavo serve` as a user starts it, with the real model and the official client."""

import asyncio
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Literal

import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI

pytestmark = [pytest.mark.server, pytest.mark.model]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_TIMEOUT_S = 60.0


class Server:
    """A server process on a free port, ready to answer."""

    def __init__(self, *flags):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo.cli", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = []
        for line in self.process.stdout:
            self.output.append(line)
            if found := re.search(r"Listening on (http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(self.output))

    def metric(self, name):
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        return float(re.search(rf"^octavo_{name} (\S+)", text, re.M)[1])

    def is_at_rest(self):
        return (
            self.metric("kv_blocks_free") == self.metric("kv_blocks")
            and self.metric("num_requests_running") == self.metric("num_requests_waiting") == 0
        )

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = Server("--dtype", "float32")
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_prints_its_url_a_curl_line_and_the_time_of_each_phase(server):
    text = "".join(server.output)
    assert "import torch" in text and "load weights" in text and "ready after" in text


def test_chat_and_completion_streamed_and_not(client):
    model = client.models.list().data[0].id
    assert model == "smollm2-135m-instruct"
    chat = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert "Paris" in chat.choices[0].message.content
    assert chat.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == chat.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens
    # The second time, all full blocks of the prompt but the last token's were found.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32
    options = {"model": model, "prompt": "The capital of France is", "temperature": 0}
    whole = client.completions.create(**options, max_tokens=12)
    pieces = client.completions.create(**options, max_tokens=12, stream=True)
    assert "Paris" in whole.choices[0].text
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text


class Person(pydantic.BaseModel):
    """What an answer is parsed to."""

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)
    languages: list[Literal["English", "French", "German"]] = pydantic.Field(max_length=2)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_parsed_to_a_type(client, temperature):
    question = [{"role": "user", "content": "Describe Marie Curie as JSON."}]
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="smollm2-135m-instruct",
            messages=question,
            response_format=Person,
            temperature=temperature,
            seed=seed,
            max_tokens=400,
        )
        person = answer.choices[0].message.parsed
        assert isinstance(person, Person) and answer.choices[0].finish_reason == "stop"
    choices = {"structured_outputs": {"choice": ["Rome", "Paris"]}}
    answer = client.chat.completions.create(
        model="smollm2-135m-instruct", messages=QUESTION, temperature=0, extra_body=choices
    )
    assert answer.choices[0].message.content == "Paris"


def test_a_salt_keeps_tenants_out_of_each_others_cache(client):
    def cached_tokens(salt):
        usage = client.completions.create(
            model="smollm2-135m-instruct",
            prompt="A secret that nobody else may know of. " * 8,
            max_tokens=1,
            extra_body={"cache_salt": salt},
        ).usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached_tokens("tenant a") == 0
    assert cached_tokens("tenant a") > 0
    assert cached_tokens("tenant b") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_beam_search_returns_the_best_answers(client, stream):
    def search(**options):
        answer = client.completions.create(
            model="smollm2-135m-instruct",
            prompt="The capital of France is",
            max_tokens=5,
            n=2,
            stream=stream,
            extra_body={"use_beam_search": True, "ignore_eos": True, **options},
        )
        texts = ["", ""]
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        return texts

    first, second = search(beam_width=4)
    assert first != second and first.startswith(" Paris")
    assert search(beam_width=4, length_penalty=0.0)  # accepted
    with pytest.raises(openai.BadRequestError, match="top_p cannot be combined"):
        search(top_p=0.5)


def prompt(i):
    return f"Here are {i + 2} facts about the number {i}:"


async def stream_text(client, i, *, seed=None, cut_after=None):
    stream = await client.completions.create(
        model="smollm2-135m-instruct",
        prompt=prompt(i),
        max_tokens=40,
        temperature=0 if seed is None else 0.8,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, num_chunks = "", 0
    async for chunk in stream:
        text += chunk.choices[0].text
        num_chunks += 1
        if num_chunks == cut_after:
            await stream.close()
            break
    return text


async def test_32_concurrent_streams_get_the_text_they_get_alone(server):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        seeds = [i if i % 2 else None for i in range(32)]
        together = await asyncio.gather(
            *(stream_text(client, i, seed=seed) for i, seed in enumerate(seeds))
        )
        for i in range(0, 32, 5):
            assert await stream_text(client, i, seed=seeds[i]) == together[i]
    assert len(set(together)) == 32


async def test_clients_that_vanish_mid_stream_leave_the_pool_at_its_baseline(server):
    aborted = server.metric('request_success_total{finished_reason="abort"}'.replace("{", r"\{"))
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        alone = {i: await stream_text(client, i) for i in (10, 31)}
        texts = await asyncio.gather(
            *(stream_text(client, i, cut_after=5 if i < 10 else None) for i in range(32))
        )
    assert {i: texts[i] for i in alone} == alone  # the survivors notice nothing
    deadline = time.monotonic() + 5
    while not server.is_at_rest() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert server.is_at_rest()
    name = 'request_success_total{finished_reason="abort"}'.replace("{", r"\{")
    assert server.metric(name) == aborted + 10


BAD_BODIES = {
    "not JSON": (b"{", 400, "invalid_json"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, None),
    "wrong type": (b'{"prompt": "a", "max_tokens": "ten"}', 400, None),
    "unknown model": (b'{"prompt": "a", "model": "gpt-9"}', 404, "model_not_found"),
    "too long": (
        b'{"prompt": [' + b"1," * 9000 + b"1]}",
        400,
        "context_length_exceeded",
    ),
    "id outside the vocabulary": (b'{"prompt": [49152]}', 400, None),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_input_is_named_and_the_server_goes_on(server, client, name):
    body, status, code = BAD_BODIES[name]
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    with caught.value as response:
        text = response.read().decode()
    assert response.code == status, text
    assert f'"code":"{code}"' in text if code else '"type":"invalid_request_error"' in text
    answer = client.completions.create(
        model="smollm2-135m-instruct",
        prompt="The capital of France is",
        temperature=0,
        max_tokens=2,
    )
    assert answer.choices[0].text == " Paris."
    assert server.is_at_rest()


def test_a_taken_port_and_a_missing_model_end_the_start_with_one_clear_line(server):
    port = server.url.rsplit(":", 1)[1]
    for arguments, expected in (
        (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
        (["/nowhere/model", "--port", "0"], "no such file or directory"),
        (["nobody/nothing", "--port", "0"], "from the hub"),
        (["--max-model-len", "9000", "--port", "0"], "at most 8192 positions"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "octavo.cli", "serve", *arguments],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        assert run.returncode == 1
        assert expected in run.stderr
        assert "Traceback" not in run.stderr
