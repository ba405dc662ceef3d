"""Calls are found in a text however it is cut, and nothing of what is no call is lost."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from server.tool_texts import NAMES, ROME, TWO, call, marked

from octavo.server.chat_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Reply,
    Retraction,
)
from octavo.server.chat_parser import ChatParser
from octavo.server.reasoning import ThinkParser
from octavo.server.tool_parsers import HermesParser, JsonParser, ToolParser

# Text of an answer: (content, calls). Nothing of what is no call may be lost.
PROPER = {
    "one": (marked(call()), "", [("weather", ROME)]),
    "two": (TWO, "Let me see.", [("weather", ROME), ("time", "{}")]),
    "no layout": (f"<tool_call>{call()}</tool_call>", "", [("weather", ROME)]),
    "around": (f"A\n\n{marked(call())}\nB", "A\nB", [("weather", ROME)]),
    "before text": (f"{marked(call())}\n\nB ", "B ", [("weather", ROME)]),
    "arguments first": (
        marked('{"arguments": {"city": "Rome"}, "name": "weather"}'),
        "",
        [("weather", ROME)],
    ),
    "other keys": (marked(f'{{"id": 7, {call()[1:]}'), "", [("weather", ROME)]),
    "parameters": (marked(call(key="parameters")), "", [("weather", ROME)]),
    "text of JSON": (marked(call(arguments=ROME)), "", [("weather", ROME)]),
    "marker in a string": (
        marked(call(arguments={"city": 'a</tool_call>"\\{'})),
        "",
        [("weather", json.dumps({"city": 'a</tool_call>"\\{'}))],
    ),
    "after a marker for nothing": (
        "<tool_call> <tool_call>" + call() + "</tool_call>",
        "<tool_call> ",
        [("weather", ROME)],
    ),
}
MALFORMED = {
    "plain": "Just text, <b>bold</b> & <tool",
    "space": " \n ",
    "unclosed": "A\n<tool_call>" + call(),
    "cut": 'A\n<tool_call>{"name": "weather", "arguments": {"city": "Ro',
    "cut name": '<tool_call>{"name": "wea',
    "no JSON": "A <tool_call>weather(Rome)</tool_call> B",
    "unknown name": "A " + marked(call("rain")) + " B",
    "no object": marked(call(arguments=[1])),
    "no arguments": marked('{"name": "weather"}'),
    "bare word": marked('{"name": "weather", "arguments": {"city": true false}}'),
    "missing brace": '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}</tool_call> B',
    "wrong bracket": marked('{"name": "weather", "arguments": {"city": ["Rome"}}}'),
    "line break": marked('{"name": "weather", "arguments": {"city": "Ro\nme"}}'),
    "open string": marked('{"name": "weather", "arguments": {"city": "Rome'),
    "text behind": "<tool_call>" + call() + " and</tool_call>",
    "two names": marked('{"name": "weather", "arguments": {}, "name": "time"}'),
    "number": marked("7"),
}


def parsed(parser: ToolParser | ChatParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def joined(events: list[Event]) -> list[Event]:
    """Neighbours that say the same thing in two pieces, as one."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        match last, event:
            case (Content(a), Content(b)):
                whole[-1] = Content(a + b)
            case (Reasoning(a), Reasoning(b)):
                whole[-1] = Reasoning(a + b)
            case (CallArguments(i, a), CallArguments(j, b)) if i == j:
                whole[-1] = CallArguments(i, a + b)
            case _:
                whole.append(event)
    return whole


def cut(text: str, places: list[int]) -> list[str]:
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(("text", "content", "calls"), PROPER.values(), ids=PROPER)
def test_proper_calls(text: str, content: str, calls: list[tuple[str, str]], size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    reply = Reply.of(parsed(HermesParser(NAMES), pieces))
    assert reply.content == content
    assert [(found.name, found.arguments) for found in reply.calls.values()] == calls


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("kind", [HermesParser, JsonParser])
def test_what_is_no_call_is_content(kind: type[ToolParser], text: str, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert Reply.of(parsed(kind(NAMES), pieces)) == Reply(content=text)


@pytest.mark.parametrize(
    ("text", "unsent"),
    [
        (MALFORMED["cut"], ""),
        (MALFORMED["unclosed"], "}"),
        (MALFORMED["text behind"], "}"),
        (MALFORMED["two names"], ', "name": "time"}'),
    ],
)
def test_a_stream_loses_nothing_of_a_call_that_it_had_told_of(text: str, unsent: str) -> None:
    events = parsed(HermesParser(NAMES), list(text))
    told = "".join(event.text for event in events if isinstance(event, CallArguments))
    [retraction] = [event for event in events if isinstance(event, Retraction)]
    assert retraction.unsent == unsent
    assert retraction.text.endswith(told + unsent)
    assert retraction.text in text


@pytest.mark.parametrize("name", ["missing brace", "wrong bracket", "open string", "no JSON"])
def test_a_proper_call_is_found_behind_a_broken_one(name: str) -> None:
    text = MALFORMED[name] + "\n" + marked(call())
    events = parsed(HermesParser(NAMES), list(text))
    assert Reply.of(events).content == MALFORMED[name]
    [found] = Reply.of(events).calls.values()
    assert (found.name, found.arguments) == ("weather", ROME)
    starts = [event.index for event in events if isinstance(event, CallStart)]
    assert starts == [*range(len(starts))]  # a stream has told of the broken one as number 0


def test_nobody_hears_of_a_tool_that_was_not_offered() -> None:
    events = parsed(HermesParser(NAMES), list(marked(call("rain"))))
    assert {type(event) for event in events} == {Content}


def test_arguments_are_told_while_they_arrive() -> None:
    parser = HermesParser(NAMES)
    head = '<tool_call>\n{"name": "weather", "arguments": '
    assert parser.feed(head) == []
    assert parser.feed('{"ci') == [CallStart(0, "weather"), CallArguments(0, '{"ci')]
    assert parser.feed('ty": "Rome"}}') == [CallArguments(0, 'ty": "Rome"}')]
    assert parser.feed("\n</tool_") == []
    assert parser.feed("call>") == [CallEnd(0)]
    assert parser.finish() == []


def test_text_waits_no_longer_than_it_must() -> None:
    parser = HermesParser(NAMES)
    assert parser.feed("a <tool") == [Content("a")]
    assert parser.feed("s>") == [Content(" <tools>")]
    assert parser.feed("\n") == []
    assert parser.feed("b") == [Content("\nb")]


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "call>"),
        *("\n", " ", '"', "\\", "{", "}", "[", "]"),
        *(call(), call("time", {}), call("rain"), '{"name": "weather", "arguments": {"city": '),
        *('"Rome"}}', "text", "<think>", "</think>", "é🙂", "; ", "}</tool_call>"),
    ]
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)
PLACES = st.lists(st.integers(0, 2000), max_size=20)
PARSERS = {
    "hermes": lambda: ChatParser(tools=HermesParser(NAMES)),
    "json": lambda: ChatParser(tools=JsonParser(NAMES)),
    "one call": lambda: ChatParser(tools=HermesParser(NAMES), parallel=False),
    "thinks": lambda: ChatParser(ThinkParser(), HermesParser(NAMES)),
    "opened": lambda: ChatParser(ThinkParser(opened=True), JsonParser(NAMES)),
    "only thinks": lambda: ChatParser(ThinkParser()),
}


@pytest.mark.parametrize("make", PARSERS.values(), ids=PARSERS)
@given(text=TEXTS, places=PLACES)
@example(text=TWO, places=list(range(200)))
@example(text="<think>\n a \n</think>\n\n" + TWO, places=list(range(200)))
def test_events_do_not_depend_on_the_cuts(make: Any, text: str, places: list[int]) -> None:
    whole = joined(parsed(make(), [text]))
    assert joined(parsed(make(), cut(text, places))) == whole
    assert joined(parsed(make(), list(text))) == whole


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (call(key="parameters"), [("weather", ROME)]),
        (f"\n {call()} \n", [("weather", ROME)]),
        (f"[{call()}, {call('time', {}, 'parameters')}]", [("weather", ROME), ("time", "{}")]),
        (f"[{call()}, {call('rain')}]", []),
        (f"{call()} {call()}", []),
        ("[]", []),
        ("[" * 5000, []),
        ("[" * 2000 + "]" * 2000, []),
        ('{"name": "weather"}', []),
        (f"Well: {call()}", []),
    ],
)
def test_an_answer_of_json(text: str, calls: list[tuple[str, str]]) -> None:
    reply = Reply.of(parsed(JsonParser(NAMES), [text]))
    assert [(found.name, found.arguments) for found in reply.calls.values()] == calls
    assert reply.content == ("" if calls else text)


LONG = {
    "markers": "<tool_call>" * 100_000,
    "calls": marked(call()) * 10_000,
    "half calls": '<tool_call>{"name": "weather", "arguments": {' * 30_000,
    "space": "\n" * 1_000_000,
    "brackets": '<tool_call>{"name": "weather", "arguments": {"a": ' + "[" * 1_000_000,
    "string": '<tool_call>{"name": "weather", "arguments": {"a": "' + "x" * 1_000_000,
}


@pytest.mark.parametrize("make", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_answers_are_read_in_time(make: Any, text: str) -> None:
    start = time.process_time()
    reply = make().read(text)
    assert time.process_time() - start < 5  # what grows with the square takes minutes
    assert reply.calls or len(reply.content + reply.reasoning) == len(text)


def test_text_that_is_no_json_is_not_held() -> None:
    parser = JsonParser(NAMES)
    assert parser.feed(" ") == []
    assert parser.feed("Well") == [Content(" Well")]
    assert parser.feed(", yes") == [Content(", yes")]
