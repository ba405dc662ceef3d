"""What else users' code speaks to us through: litellm, LangChain, and curl.

Their packages are imported by the first test that needs them, for that takes seconds.
"""

import gc
import json
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from server.helpers import CONFIG, LiveServer, eventually, serving
from server.templates import HERMES, engine_of, prompt_of
from server.test_server_keys import bearer, entry
from server.tool_texts import ROME, TWO

from octavo.core import Adapter
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine

# Their warnings are about their own code and the libraries below it.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "Hi"}]
ANSWER = "Answer 0 to: user: Hi\nassistant: "
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "parameters": PARAMETERS}},
]


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    """Let the clients that these packages keep go while their warnings are still ignored."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def litellm() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the internet
        import litellm

        patch.setattr(litellm, "suppress_debug_info", True)
        yield litellm
        litellm.in_memory_llm_clients_cache.flush_cache()


@pytest.fixture(scope="module")
def tool_server() -> Iterator[LiveServer]:
    with serving(engine_of(HERMES, TWO), CONFIG) as live:
        yield live


@pytest.fixture
def used_up(tmp_path: Path) -> Iterator[LiveServer]:
    """A server whose key has just sent all its requests of this minute; one comes back a second."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("few", "k", requests_per_minute=60))
    with serving(FakeEngine(), ServerConfig(api_key_file=str(path))) as live:
        with httpx.Client(base_url=live.url, headers=bearer("k")) as client:
            while client.post("/v1/completions", json={}).status_code == 400:
                pass
        yield live


def at(server: LiveServer, key: str = "any") -> dict[str, Any]:
    """How litellm is told of a server."""
    return {"model": "openai/fake-model", "api_base": f"{server.url}/v1", "api_key": key}


def test_litellm_completes_and_streams(litellm: ModuleType, server: LiveServer) -> None:
    whole = litellm.completion(messages=MESSAGES, temperature=0, seed=1, **at(server))
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(ANSWER) + 1
    chunks = list(
        litellm.completion(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **at(server)
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert chunks[-1].usage.completion_tokens == len(ANSWER) + 1
    text = litellm.text_completion(
        prompt="Hi", max_tokens=6, **(at(server) | {"model": "text-completion-openai/fake-model"})
    )
    assert text.choices[0].text == "Answer"


async def test_litellm_is_asynchronous(litellm: ModuleType, server: LiveServer) -> None:
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **at(server))
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert text == ANSWER


def test_litellm_speaks_responses(litellm: ModuleType, server: LiveServer) -> None:
    response = litellm.responses(input="Hi", **at(server))
    assert response.output[0].content[0].text == ANSWER
    # Of a model that it does not know it asks for the whole, and plays the stream itself.
    known = {"litellm_provider": "openai", "mode": "chat", "supports_native_streaming": True}
    litellm.register_model({"fake-model": known})
    events = list(litellm.responses(input="Hi", stream=True, **at(server)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER and len(deltas) == len(ANSWER)


def test_litellm_calls_tools(litellm: ModuleType, tool_server: LiveServer) -> None:
    whole = litellm.completion(messages=MESSAGES, tools=TOOLS, **at(tool_server))
    calls = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("weather", ROME),
        ("time", "{}"),
    ]
    answers = [{"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in calls]
    messages = [*MESSAGES, whole.choices[0].message, *answers]
    litellm.completion(messages=messages, tools=TOOLS, **at(tool_server))
    assert prompt_of(tool_server.engine).endswith(
        f"tool: sun from weather for {calls[0].id}\ntool: sun from time for {calls[1].id}\n"
        "assistant: "
    )
    chunks = list(
        litellm.completion(messages=MESSAGES, tools=TOOLS, stream=True, **at(tool_server))
    )
    built = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert [c.function.arguments for c in built] == [ROME, "{}"]


def test_litellm_knows_our_errors(litellm: ModuleType, server: LiveServer) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist here"):
        litellm.completion(messages=MESSAGES, **(at(server) | {"model": "openai/gpt-9"}))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=MESSAGES, temperature=-1, **at(server))
    # By its words: so a router falls back to a model with more room.
    with pytest.raises(litellm.ContextWindowExceededError, match="4096 tokens"):
        content = "x" * 5000
        litellm.completion(messages=[{"role": "user", "content": content}], **at(server))
    server.engine.script.max_requests = 0
    with pytest.raises(litellm.ServiceUnavailableError, match="overloaded"):
        litellm.completion(messages=MESSAGES, max_retries=0, **at(server))


def test_litellm_waits_for_its_turn(litellm: ModuleType, used_up: LiveServer) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=MESSAGES, max_retries=0, **at(used_up, "wrong"))
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(messages=MESSAGES, max_retries=0, **at(used_up, "k"))
    whole = litellm.completion(messages=MESSAGES, max_retries=2, **at(used_up, "k"))
    assert whole.choices[0].message.content == ANSWER


def chat_model(server: LiveServer, key: str = "any", **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    settings = {"model": "fake-model", "base_url": f"{server.url}/v1", "max_retries": 0}
    return ChatOpenAI(api_key=key, **(settings | fields))


async def test_langchain_completes_and_streams(server: LiveServer) -> None:
    # Both in one test: LangChain keeps its asynchronous client, whatever loop that belongs to.
    for model in (chat_model(server), chat_model(server, use_responses_api=True)):
        whole = model.invoke("Hi")
        assert whole.text == ANSWER
        assert whole.usage_metadata["output_tokens"] == len(ANSWER) + 1
        assert "".join(chunk.text for chunk in model.stream("Hi")) == ANSWER
        assert "".join([chunk.text async for chunk in model.astream("Hi")]) == ANSWER
        answers = [message.text for message in model.batch(["Hi", "Ho"])]
        assert answers == [ANSWER, ANSWER.replace("Hi", "Ho")]


@pytest.mark.parametrize("fields", [{}, {"use_responses_api": True}], ids=["chat", "responses"])
def test_langchain_calls_tools(tool_server: LiveServer, fields: dict[str, Any]) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chat_model(tool_server, **fields).bind_tools(TOOLS)
    whole = model.invoke("Weather?")
    told = [(call["name"], call["args"]) for call in whole.tool_calls]
    assert told == [("weather", {"city": "Rome"}), ("time", {})]
    results = [ToolMessage("sun", tool_call_id=call["id"]) for call in whole.tool_calls]
    model.invoke([HumanMessage("Weather?"), whole, *results])
    prompt = prompt_of(tool_server.engine)
    assert [f"tool: sun from {name} for" in prompt for name in ("weather", "time")] == [True] * 2
    added = None
    for chunk in model.stream("Weather?"):
        added = chunk if added is None else added + chunk
    assert added is not None
    assert [(call["name"], call["args"]) for call in added.tool_calls] == told


def test_langchain_raises_the_official_errors(server: LiveServer, used_up: LiveServer) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(server, temperature=-1).invoke("Hi")
    with pytest.raises(openai.AuthenticationError):
        chat_model(used_up, "wrong").invoke("Hi")
    with pytest.raises(openai.RateLimitError):
        chat_model(used_up, "k").invoke("Hi")


def test_langchain_waits_for_its_turn(used_up: LiveServer) -> None:
    model = chat_model(used_up, "k", max_retries=2)
    assert model.invoke("Hi").text == ANSWER


# A command may go on over lines that end in a backslash, or within its quotes.
_CURL = re.compile(r"^(?:\$ )?(curl (?:'[^']*'|\"[^\"]*\"|\\\n|[^'\"\n])*)", re.M)
_VARIABLES = re.compile(r"^(\w+)='([^']*)'$", re.M)


def curl_commands() -> list[tuple[str, str]]:
    """Each curl line of README and docs that asks this server for something, with its page."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        variables = dict(_VARIABLES.findall(text))
        for command in _CURL.findall(text):
            for name, value in variables.items():
                command = command.replace(f'"${name}"', shlex.quote(value))
            if "127.0.0.1:8000" in command:
                found.append((page.name, command.replace("\\\n", " ").strip()))
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("page", "command"), curl_commands())
def test_curl_lines_of_the_docs_work(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, page: str, command: str
) -> None:
    monkeypatch.setitem(server.engine.adapters, "sql", Adapter("sql", "1"))  # of docs/lora.md
    in_background = command.endswith("&")
    words = shlex.split(command.rstrip("& ").partition(" | ")[0], comments=True)
    words = [
        re.sub(r"^(https?://)?(127\.0\.0\.1|localhost):8000", server.url, word) for word in words
    ]
    if any("/debug/requests/" in word for word in words):
        return asks_of_a_running_request(server, words)
    ended = subprocess.run(
        [*words, "-s", "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=20
    )
    body, _, status = ended.stdout.rpartition("\n")
    httpx.post(f"{server.url}/wake_up")  # some pages send the server to sleep
    assert (ended.returncode, status) == (0, "200"), (page, command, ended.stdout, ended.stderr)
    assert in_background or body
    return None


def asks_of_a_running_request(server: LiveServer, words: list[str]) -> None:
    """The request that the page has sent in the line before."""
    server.engine.script.token_delay_s = 0.05
    url = f"{server.url}/v1/chat/completions"
    head = ["curl", "-s", url, "-H", "X-Request-Id: mine", "-H", "Content-Type: application/json"]
    body = json.dumps({"messages": MESSAGES})
    running = subprocess.Popen([*head, "-d", body], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: bool(server.engine.live))
        ended = subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=20)
        assert "answers" in json.loads(ended.stdout), ended.stdout
    finally:
        running.kill()
        running.wait()


def test_there_are_curl_lines_to_test() -> None:
    pages = {page for page, _ in curl_commands()}
    assert {"README.md", "pages.md", "sharing.md", "responses.md"} <= pages


def test_litellm_embeds(litellm: ModuleType, server: LiveServer) -> None:
    response = litellm.embedding(input=["Hi", "Hello"], encoding_format="float", **at(server))
    assert [item["embedding"] for item in response.data] == [
        [3.0, 256.0, 105.0],
        [6.0, 256.0, 111.0],
    ]
    assert response.usage.prompt_tokens == 9


def test_langchain_embeds(server: LiveServer) -> None:
    from langchain_openai import OpenAIEmbeddings

    # As its documentation has it for servers that are not OpenAI's; by default it sends token ids
    # of OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(
        model="fake-model",
        base_url=f"{server.url}/v1",
        api_key="any",
        check_embedding_ctx_length=False,
        max_retries=0,
    )
    texts = ["Hi", "Hello"]
    assert embeddings.embed_documents(texts) == [[3.0, 256.0, 105.0], [6.0, 256.0, 111.0]]
    assert embeddings.embed_query("Hi") == [3.0, 256.0, 105.0]
