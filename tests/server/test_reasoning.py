"""Reasoning is told apart from the answer, whole and streamed, and the tags are never shown."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.helpers import CONFIG, LiveServer, client_of, serving
from server.templates import HERMES, PLAIN, QWEN3, R1, TemplateTokenizer, engine_of, prompt_of

from octavo.engine import ServedModel
from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.server.chat_events import Content, Reasoning
from octavo.server.reasoning import ThinkParser
from octavo.testing.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODY = {"messages": MESSAGES}
ANSWER = "<think>\nA\n\n<b> B </thin \n</think>\n\nHello</think> you \n"
THOUGHT, SAID = "A\n\n<b> B </thin", "Hello</think> you \n"

# Text of an answer: (opened by the prompt, reasoning, content)
ANSWERS = {
    "both": (ANSWER, False, THOUGHT, SAID),
    "opened": (ANSWER.removeprefix("<think>\n"), True, THOUGHT, SAID),
    "opened twice": (ANSWER, True, THOUGHT, SAID),
    "space before": ("\n <think>A</think>B", False, "A", "B"),
    "none": ("Hello", False, "", "Hello"),
    "none, and space": ("  Hello ", False, "", "  Hello "),
    "later": ("Use <think>x</think>", False, "", "Use <think>x</think>"),
    "half a tag": ("<thi", False, "", "<thi"),
    "half a tag, opened": ("<thi", True, "<thi", ""),
    "another tag": ("<thin>k", False, "", "<thin>k"),
    "empty": ("<think>\n\n</think>\n\nB", False, "", "B"),
    "cut": ("<think>A and </thi", False, "A and </thi", ""),
    "only thought": ("<think>A</think>\n", False, "A", ""),
    "nothing": ("", True, "", ""),
}


def split(text: str, pieces: list[str], *, opened: bool) -> tuple[str, str]:
    parser = ThinkParser(opened=opened)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=[Reasoning, Content].index)
    assert all(event.text for event in events)
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    return thought, "".join(event.text for event in events if isinstance(event, Content))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "opened", "thought", "said"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_split(text: str, opened: bool, thought: str, said: str, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert split(text, pieces, opened=opened) == (thought, said)


@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "</", "th", "\n", " ", "a", "é"])),
    places=st.lists(st.integers(0, 100)),
    opened=st.booleans(),
)
def test_the_cuts_do_not_matter(parts: list[str], places: list[int], opened: bool) -> None:
    text = "".join(parts)
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    pieces = [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    thought, said = split(text, pieces, opened=opened)
    assert (thought, said) == split(text, [text], opened=opened)
    assert "</think>" not in thought
    tags = text.replace("<think>", "", 1).replace("</think>", "", 1)
    assert "".join((thought + said).split()) in {"".join(t.split()) for t in _untagged(text, tags)}


def _untagged(text: str, both: str) -> set[str]:
    return {text, both, text.replace("<think>", "", 1), text.replace("</think>", "", 1)}


def test_thoughts_are_told_as_they_come() -> None:
    parser = ThinkParser()
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nA b") == [Reasoning("A b")]
    assert parser.feed(" </") == []
    assert parser.feed("b>") == [Reasoning(" </b>")]
    assert parser.feed("</think>\n") == []
    assert parser.feed("\nC ") == [Content("C ")]
    assert parser.finish() == []


async def deltas_of(client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(CHAT, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    frames = response.text.split("\n\n")[:-2]
    choices = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
    return [choice["delta"] for choice in choices]


@pytest.mark.parametrize(
    ("template", "reply"), [(QWEN3, ANSWER), (R1, ANSWER.removeprefix("<think>\n"))]
)
@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"return_token_ids": True}])
async def test_responses_have_reasoning(template: str, reply: str, extra: dict[str, Any]) -> None:
    async with client_of(engine_of(template, reply)) as client:
        [choice] = (await client.post(CHAT, json=BODY | extra)).json()["choices"]
        message = choice["message"]
        assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)
        assert message["reasoning"] == THOUGHT
        deltas = await deltas_of(client, BODY | extra)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("reasoning", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content", "") for delta in deltas) == SAID
    assert len(deltas) > len(THOUGHT)  # as they came, not at the end


async def test_frames_are_the_same_with_and_without_further_fields() -> None:
    """The fast path says what the slow path says."""
    async with client_of(engine_of(QWEN3, ANSWER)) as client:
        fast = await deltas_of(client, BODY)
        slow = await deltas_of(client, BODY | {"return_token_ids": True})
    assert [delta for delta in slow[:-1] if delta] == fast[:-1]


async def test_several_answers_are_split_each_for_itself() -> None:
    engine = engine_of(QWEN3)
    engine.script.reply = lambda prompt, index: f"<think>{index}</think>{index * 'x'}!"
    async with client_of(engine) as client:
        choices = (await client.post(CHAT, json=BODY | {"n": 3})).json()["choices"]
    told = [(c["message"]["reasoning_content"], c["message"]["content"]) for c in choices]
    assert told == [("0", "!"), ("1", "x!"), ("2", "xx!")]


@pytest.mark.parametrize("template", [PLAIN, HERMES])
async def test_templates_that_do_not_reason_leave_tags_alone(template: str) -> None:
    async with client_of(engine_of(template, ANSWER)) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}


@pytest.mark.parametrize(
    ("template", "parser", "splits"),
    [(PLAIN, "think", True), (QWEN3, "off", False), (QWEN3, "auto", True), (PLAIN, "auto", False)],
)
async def test_the_operator_chooses(template: str, parser: str, splits: bool) -> None:
    config = ServerConfig(reasoning_parser=parser)
    async with client_of(engine_of(template, ANSWER), config) as client:
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
    assert choice["message"]["content"] == (SAID if splits else ANSWER)
    assert ("reasoning_content" in choice["message"]) is splits


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match="think"):
        ServerConfig(reasoning_parser="deepseek_r1")


async def test_arguments_reach_the_template() -> None:
    engine = engine_of(QWEN3, "Hello")
    async with client_of(engine) as client:
        body = BODY | {"chat_template_kwargs": {"enable_thinking": False}}
        [choice] = (await client.post(CHAT, json=body)).json()["choices"]
        assert choice["message"]["content"] == "Hello"
        assert prompt_of(engine).endswith("assistant: <think>\n\n</think>\n\n")
        assert (await client.post(CHAT, json=BODY)).status_code == 200
        assert prompt_of(engine).endswith("assistant: ")


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenize": True},
        {"tools": []},
        {"chat_template": "{{ 1 }}"},
        {"messages": []},
        {"add_generation_prompt": False},
        {"raise_exception": 1},
        {"x": "x" * 2**16},
        {f"x{i}": i for i in range(10_000)},
        {"x": json.loads("[" * 33 + "]" * 33)},
        [],
        "x",
    ],
    ids=lambda arguments: str(arguments)[:20],
)
async def test_wrong_arguments_are_refused(arguments: Any) -> None:
    engine = engine_of(QWEN3)
    async with client_of(engine) as client:
        response = await client.post(CHAT, json=BODY | {"chat_template_kwargs": arguments})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == "chat_template_kwargs"
        assert len(error["message"]) < 200
    assert not engine.received


async def test_earlier_reasoning_reaches_the_template() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}[{{ m.reasoning_content }}|{{ m.content }}]{% endfor %}"
    )
    engine = engine_of(template)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
        {"role": "assistant", "content": None, "reasoning": "d"},
    ]
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={"messages": turns})
        assert response.status_code == 200, response.text
        assert prompt_of(engine) == "user[|a]assistant[c|b]assistant[d|]"
        turns[0]["reasoning"] = "x"
        error = (await client.post(CHAT, json={"messages": turns})).json()["error"]
        assert error["param"] == "messages[0].reasoning_content"


class SpecialThink(TemplateTokenizer):
    """Has a control token for the closing tag, which texts leave out by default."""

    special_token_ids = frozenset({256, 257})

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        if list(token_ids) == [256] and not skip_special_tokens:
            return "</think>"
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("tokenizer", [SpecialThink(QWEN3), TemplateTokenizer(QWEN3)])
async def test_tags_that_are_control_tokens_are_asked_for(tokenizer: TemplateTokenizer) -> None:
    engine = FakeEngine()
    engine.model = ServedModel(engine.name, 4096, tokenizer.vocab_size, tokenizer)
    async with client_of(engine) as client:
        assert (await client.post(CHAT, json=BODY)).status_code == 200
    [(_, sampling)] = engine.received.values()
    assert sampling.skip_special_tokens is not isinstance(tokenizer, SpecialThink)


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[LiveServer]:
    with serving(engine_of(QWEN3, ANSWER), CONFIG) as live:
        yield live


def test_the_official_client(thinking_server: LiveServer) -> None:
    url = f"{thinking_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        chat: dict[str, Any] = {"model": "fake-model", "messages": MESSAGES}
        message = client.chat.completions.create(**chat).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, SAID)
        thought = said = ""
        for chunk in client.chat.completions.create(**chat, stream=True):
            delta = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            said += delta.content or ""
    assert (thought, said) == (THOUGHT, SAID)
