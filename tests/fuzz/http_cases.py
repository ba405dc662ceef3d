"""Hostile HTTP requests, each drawn from a seed, as the bytes that go over the wire."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.server import ServerConfig, create_app
from octavo.server.app import route_table
from octavo.server.openapi import EXAMPLES
from octavo.testing.fake_engine import FakeEngine

MAX_BODY_BYTES = 2**16  # of the server under test

JSON_HEADERS = {"Host": "octavo", "Content-Type": "application/json"}
_HOLE = "@hole@"  # where a value stands that `json` would not write

ODD_VALUES: tuple[Any, ...] = (
    *(
        "",
        "x",
        " ",
        "\0",
        "💥" * 9,
        "\u202e",
        "ﷺ" * 50,
        "a" * 5000,
        "NaN",
        "null",
        "../../etc/passwd",
    ),
    *(-1, 0, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(1e308, -1e308, -0.0, 0.1, 5e-324, 0.9999999999999999, 1.0),
    *(True, False, None),
    *([], {}, [[]], {"a": 1}, [None], [1, "a", {}], {"": ""}, ["a"] * 300, [0] * 3000),
    *(
        {"type": "text"},
        {"type": "json_object"},
        {"type": "function", "name": "f"},
        "auto",
        "required",
    ),
    {"type": "json_schema", "schema": {"type": "object"}, "json_schema": {"schema": {}}},
    {str(i): i for i in range(300)},
)
ODD_TEXTS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "01",
        ".5",
        "+1",
        "0x10",
        "1e",
        "'a'",
        "nul",
    ),
    *(r'"\ud800"', r'"\udfff\ud800"', r'"\u0000"', r'"\x"', '"\t"', '"', '"\x7f"', "1" * 4000),
    *('{"a": 1, "a": 2}', "[1,]", "{,}", "[", "{", "]", ""),
)
DEPTHS = (8, 33, 300, 3000, 12_000)

# Bodies with more to damage than the examples of the documentation have.
_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RICH: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "a"}]},
                {"role": "user", "content": "b", "name": "c"},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "d"},
            ],
            "tools": [{"type": "function", "function": _TOOL}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 5,
        }
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "logit_bias": {"5": 1}, "stop": ["x"]},
        {"prompt": [1, 2], "max_tokens": 3, "stream": True, "seed": 1, "temperature": 0.5},
        {"prompt": [[1], [2]], "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 2},
    ],
    "/v1/embeddings": [
        {
            "input": ["a", "b"],
            "encoding_format": "base64",
            "pooling": "mean",
            "normalize": False,
            "truncate_prompt_tokens": 3,
            "priority": 1,
            "cache_salt": "s",
        },
        {"input": [[1, 2], [3]], "user": "u", "add_special_tokens": False},
    ],
    "/v1/responses": [
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "d"},
            ],
            "tools": [{"type": "function"} | _TOOL],
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
            "truncation": "auto",
            "stream": True,
        },
        {"input": "a", "background": True, "max_output_tokens": 3},
    ],
}


@dataclass(frozen=True)
class HttpCase:
    """One request. `method` says how its response is read."""

    seed: int
    method: str
    wire: bytes
    note: str


@dataclass
class _Draft:
    """A request while it is made."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    fields: tuple[str, ...]  # that the body may have
    notes: list[str]
    head: bytes | None = None  # instead of the request line and the headers


def _templates() -> list[tuple[str, str, tuple[str, ...], list[dict[str, Any]]]]:
    """(method, path, names of fields, sound bodies) of every route."""
    state = create_app(FakeEngine(), ServerConfig()).state.octavo
    found = []
    for routes in route_table(state).values():
        for route in routes:
            bodies = [] if route.body is None else [dict(EXAMPLES[route.body])]
            fields = () if route.body is None else route.body.__struct_fields__
            found.append((route.method, route.path, fields, bodies + RICH.get(route.path, [])))
    return found


TEMPLATES = _templates()
_WITH_BODY = [template for template in TEMPLATES if template[3]]


def draw_http_case(seed: int) -> HttpCase:
    """The request of a seed, the same at every call."""
    rng = random.Random(seed)
    method, path, fields, bodies = rng.choice(_WITH_BODY if rng.random() < 0.85 else TEMPLATES)
    path = re.sub(r"\{model(:\w+)?\}", "fake-model", path)
    path = re.sub(r"\{\w+\}", lambda _: rng.choice(("resp_x", "%00", "..", "a" * 3000, "é")), path)
    draft = _Draft(method, path, b"", dict(JSON_HEADERS), fields, [])
    value: Any = json.loads(json.dumps(rng.choice(bodies))) if bodies else None
    texts: list[str] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3)) if bodies else 0):
        value = _damaged(rng, value, draft, texts)
    if value is not None:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
        for odd in texts:
            text = text.replace(json.dumps(_HOLE), odd, 1)
        draft.body = text.encode("utf-8", "surrogatepass")
    for chance, damage in _WIRE_DAMAGE:
        if rng.random() < chance:
            damage(rng, draft)
    return HttpCase(seed, draft.method, _wire(draft), f"{method} {path}: {', '.join(draft.notes)}")


def _damaged(rng: random.Random, value: Any, draft: _Draft, texts: list[str]) -> Any:
    """A JSON value with one thing put in, replaced or taken away."""
    odd: Any = rng.choice(ODD_VALUES)
    kind = rng.random()
    if kind < 0.2:
        odd = _HOLE
        texts.append(rng.choice(ODD_TEXTS))
        draft.notes.append(f"text {texts[-1][:20]!r}")
    elif kind < 0.3:
        odd, depth = _HOLE, rng.choice(DEPTHS)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        texts.append(opening * depth + "1" + closing * rng.choice((depth, 0)))
        draft.notes.append(f"{depth} deep")
    else:
        draft.notes.append(f"value {str(odd)[:20]!r}")
    if isinstance(value, dict) and rng.random() < 0.5 and draft.fields:
        name = rng.choice(draft.fields)
        draft.notes[-1] += f" as {name}"
        return value | {name: odd}
    return _replaced(rng, value, odd)


def _replaced(rng: random.Random, value: Any, odd: Any) -> Any:
    """The value with `odd` somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {other: item for other, item in value.items() if other != name}
        return value | {name: _replaced(rng, value[name], odd)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], _replaced(rng, value[index], odd), *value[index + 1 :]]
    return odd


def _cut(rng: random.Random, draft: _Draft) -> None:
    draft.body = draft.body[: rng.randrange(len(draft.body) + 1)]
    draft.notes.append("cut")


def _flip(rng: random.Random, draft: _Draft) -> None:
    body = bytearray(draft.body)
    for _ in range(rng.choice((1, 1, 3, 20)) if body else 0):
        body[rng.randrange(len(body))] = rng.randrange(256)
    draft.body = bytes(body)
    draft.notes.append("bytes flipped")


def _replace_body(rng: random.Random, draft: _Draft) -> None:
    bodies = (
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{}{}",
        rng.randbytes(50),
    )
    draft.body = rng.choice((*bodies, b" " * 1000, b"a" * (MAX_BODY_BYTES + 1), b"[" * 60_000))
    draft.notes.append(f"body {draft.body[:10]!r}")


def _method(rng: random.Random, draft: _Draft) -> None:
    methods = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO", "get", "POST")
    draft.method = rng.choice(methods)
    draft.notes.append(draft.method)


def _path(rng: random.Random, draft: _Draft) -> None:
    path = draft.path
    changes: tuple[Callable[[], str], ...] = (
        lambda: f"/{path}",
        lambda: path.replace("/", "//"),
        lambda: f"{path}/",
        lambda: f"{path}?{'a=%ff&' * 50}stream=1",
        lambda: f"{path}#a",
        lambda: f"{path}%00",
        lambda: f"{path}/../..//etc/passwd",
        lambda: path.upper(),
        lambda: path + "a" * rng.choice((10, 10_000, 70_000)),
        lambda: f"http://elsewhere{path}",
        lambda: path.replace("/", "%2f"),
        lambda: path + "é\x80",
        lambda: "*",
        lambda: "",
    )
    draft.path = rng.choice(changes)()
    draft.notes.append(f"path {draft.path[:30]!r}")


_HEADERS: tuple[Mapping[str, str], ...] = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "multipart/form-data"},
    {"Content-Type": ""},
    {"Content-Type": "a" * 5000},
    {"Content-Encoding": "gzip"},
    {"Accept": "text/html"},
    {"Accept": "application/xml;q=nan"},
    {"Authorization": "Bearer é\x80"},
    {"Authorization": "Basic " + "=" * 3000},
    {"X-Request-Id": "a b\x7f<script>"},
    {"X-Request-Id": "x" * 65},
    {"X-Request-Id": "mine"},
    {"Host": "a/../b:99999"},
    {"Range": "bytes=0-0,-1"},
    {"Expect": "100-continue"},
    {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x"},
    {"Connection": "close"},
    {"Cookie": "a=b; " * 500},
    {"traceparent": "00-" + "0" * 32 + "-zz-01"},
    {f"X-{i}": "a" for i in range(150)},
    {f"X-{i}": "a" * 5000 for i in range(20)},
)


def _headers(rng: random.Random, draft: _Draft) -> None:
    added = rng.choice(_HEADERS)
    draft.headers |= added
    draft.notes.append(f"header {next(iter(added))}")


def _length(rng: random.Random, draft: _Draft) -> None:
    """A length that is a lie. One that is too long makes the server wait: fewer of these."""
    lies = (
        "-1",
        "x",
        "0",
        "1",
        "1e3",
        "5, 6",
        str(2**70),
        "9" * 5000,
        "٣",
        str(len(draft.body) + 9),
    )
    draft.headers["Content-Length"] = rng.choice(lies)
    draft.notes.append(f"length {draft.headers['Content-Length'][:9]}")


def _chunked(rng: random.Random, draft: _Draft) -> None:
    ends = (b"0\r\n\r\n", b"0\r\n\r\n", b"zz\r\n\r\n", b"-1\r\n\r\n", b"fffffffffffffffffff\r\n")
    body = draft.body
    draft.body = (
        b"%x\r\n%s\r\n" % (len(body), body) + rng.choice(ends) if body else rng.choice(ends)
    )
    draft.headers["Transfer-Encoding"] = rng.choice(("chunked", "chunked", "gzip, chunked", "x"))
    draft.notes.append("chunked")


def _head(rng: random.Random, draft: _Draft) -> None:
    heads = (
        b"POST /v1/completions HTTP/9.9\r\nHost: a\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: a\n\n",
        b"GET  /health  HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nA\0B: c\r\n\r\n",
        b"CONNECT octavo:443 HTTP/1.1\r\nHost: octavo\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        rng.randbytes(100) + b"\r\n\r\n",
    )
    draft.head = rng.choice(heads)
    draft.notes.append(f"head {draft.head[:30]!r}")


_WIRE_DAMAGE: tuple[tuple[float, Callable[[random.Random, _Draft], None]], ...] = (
    (0.06, _cut),
    (0.06, _flip),
    (0.04, _replace_body),
    (0.04, _method),
    (0.05, _path),
    (0.10, _headers),
    (0.02, _length),
    (0.02, _chunked),
    (0.02, _head),
)


def _wire(draft: _Draft) -> bytes:
    if draft.head is not None:
        return draft.head + draft.body
    headers = dict(draft.headers)
    if "Transfer-Encoding" not in headers:
        headers.setdefault("Content-Length", str(len(draft.body)))
    lines = [f"{draft.method} {draft.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + draft.body
