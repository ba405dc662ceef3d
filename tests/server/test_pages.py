"""The pages and the document that /docs shows: complete, true to the server, safe to open."""

import base64
import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from server.helpers import CONFIG, client_of
from starlette.routing import Route

import octavo.server
from octavo.core import SamplingParams
from octavo.server import ServerConfig, create_app
from octavo.server.limits import Limits
from octavo.server.openapi import EXAMPLES, field_meanings
from octavo.server.protocol import ChatRequest, sampling_params
from octavo.testing.fake_engine import FakeEngine

PAGES = ("/", "/docs")
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEYS = ServerConfig(api_key="k")

GOOD_REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "a"},
        {"prompt": ["a", "b"], "n": 2, "stop": ["x"], "logit_bias": {"5": -1.5}, "seed": None},
        {"prompt": [1, 2], "temperature": 0.5, "stream": True, "unknown": 1},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "top_k": 4},
        {
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ],
    "/v1/responses": [
        {"input": "a", "tools": None, "text": {"format": {"type": "text"}}},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": "a", "stream": True, "metadata": {"b": "c"}},
    ],
    "/tokenize": [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    "/detokenize": [{"tokens": [72, 105]}],
    "/generate": [{"inputs": "a"}, {"inputs": "a", "parameters": {"top_k": 3, "grammar": None}}],
    "/v2/models/{model}/generate": [{"text_input": "a", "parameters": {"top_p": 0.5}}],
    "/v2/models/{model}/infer": [
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
    ],
}
WRONG_REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": "ten"},
    "/v1/chat/completions": {"messages": "a"},
    "/v1/responses": {"input": 3},
    "/tokenize": {"prompt": 3},
    "/detokenize": {},
    "/generate": {"inputs": "a", "parameters": {"top_k": 0.5}},
    "/v2/models/{model}/generate": {"text_input": None},
    "/v2/models/{model}/infer": {"inputs": [{"name": "text_input"}]},
}


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema | {"components": document["components"]})


def body_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return body  # type: ignore[no-any-return]


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def test_every_route_is_in_the_document(document: dict[str, Any]) -> None:
    routes = [r for r in create_app(FakeEngine(), CONFIG).routes if isinstance(r, Route)]
    served = {
        (method, re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    shown = {(method, path) for method, path, _ in operations(document)}
    assert shown == served and len(served) > 25
    for _, path, operation in operations(document):
        assert operation["summary"] and operation["tags"], path
        assert set(re.findall(r"\{(\w+)\}", path)) == {
            p["name"] for p in operation["parameters"] if p["in"] == "path"
        }


async def test_the_security_that_is_shown_is_the_one_that_holds(document: dict[str, Any]) -> None:
    async with client_of(FakeEngine(), KEYS) as locked:
        for method, path, operation in operations(document):
            path = path.replace("{model}", "fake-model")
            status = (await locked.request(method, path)).status_code
            assert (status == 401) == bool(operation["security"]), path
            assert (status == 401) == ("401" in operation["responses"]), path
    admin = document["paths"]["/server_info"]["get"]
    assert admin["security"] == [{"key": ["admin"]}] and "key: admin" in admin["description"]
    assert "403" in admin["responses"] and "429" not in admin["responses"]
    assert "429" in document["paths"]["/v1/completions"]["post"]["responses"]


async def test_what_comes_back_has_the_type_that_is_shown(
    client: httpx.AsyncClient, engine: FakeEngine, document: dict[str, Any]
) -> None:
    engine.num_expert_tokens = {"blocks.0.mlp": [3, 1]}
    for method, path, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if path == "/debug/requests/{request_id}" or "{response_id}" in path:
            continue  # nothing runs, nothing is stored
        response = await client.request(
            method, path.replace("{model}", "fake-model"), json=body.get("example")
        )
        assert response.status_code == 200, (path, response.text)
        shown = list(operation["responses"]["200"].get("content", []))
        got = response.headers.get("content-type", "").partition(";")[0]
        assert got in shown if shown else got == "", path


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    bodies = [operation for _, _, operation in operations(document) if "requestBody" in operation]
    assert len(bodies) >= 11
    for operation in bodies:
        body = operation["requestBody"]["content"]["application/json"]
        validator(document, body["schema"]).validate(body["example"])
    for struct, example in EXAMPLES.items():
        msgspec.convert(example, struct)


@pytest.mark.parametrize("path", GOOD_REQUESTS)
async def test_schemas_take_what_the_server_takes(
    client: httpx.AsyncClient, document: dict[str, Any], path: str
) -> None:
    check = validator(document, body_of(document, path)["schema"])
    url = path.replace("{model}", "fake-model")
    for body in GOOD_REQUESTS[path]:
        check.validate(body)
        assert (await client.post(url, json=body)).status_code == 200, body
    wrong = WRONG_REQUESTS[path]
    response = await client.post(url, json=wrong)
    assert not check.is_valid(wrong) and response.status_code == 400
    error = document["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]
    validator(document, error["schema"]).validate(response.json())
    shown = document["components"]["schemas"]["ErrorObject"]["properties"]
    assert response.json()["error"].keys() == shown.keys()


def test_fields_are_described_by_the_docstrings_and_defaults_are_the_ones_in_force(
    document: dict[str, Any],
) -> None:
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["top_k"]["description"] == "keep the k likeliest tokens; 0 or -1 keeps all."
    assert fields["top_k"]["default"] == 0 and fields["temperature"]["default"] == 1.0
    assert fields["beam_width"]["description"] == "see use_beam_search."
    assert fields["cache_salt"]["description"].startswith("requests with different salts")
    assert "description" not in fields["logprobs"], "it is another thing than the engine's"
    assert {"type": "object", "additionalProperties": {"type": "number"}} in fields["logit_bias"][
        "anyOf"
    ]
    absent = sampling_params(
        ChatRequest(messages=[]), Limits.of(CONFIG), max_tokens=None, logprobs=None
    )
    for name, field in fields.items():
        if field.get("default") is not None and name in SamplingParams.__struct_fields__:
            assert getattr(absent, name) == field["default"], name


def test_meanings_of_fields() -> None:
    class Words(msgspec.Struct):
        """Not a field: this.

        one, two: are
            here, and `three`. four: follows.
        """

        one: int
        two: int
        three: int
        four: int
        five: int

    here = "are here, and `three`."
    assert field_meanings(Words) == {
        "one": here,
        "two": here,
        "three": "see one.",
        "four": "follows.",
    }


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_may_run_its_own_script_and_ask_its_own_server(path: str) -> None:
    async with client_of(FakeEngine(), KEYS) as locked:
        response = await locked.get(path, headers=HTML)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(rf"<{element}>(.*?)</{element}>", response.text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert "innerHTML" not in response.text and "://" not in response.text
    assert "fake-model" not in response.text


async def test_the_root_is_json_for_who_does_not_want_a_page(client: httpx.AsyncClient) -> None:
    for accept in ("application/json", "*/*"):
        response = await client.get("/", headers={"accept": accept})
        assert response.json()["models"] == ["fake-model"]
        assert response.headers["vary"] == "accept"
    async with client_of(FakeEngine(), KEYS) as locked:
        about = (await locked.get("/", headers={"accept": "application/json"})).json()
        assert about.keys() == {"name", "see"}, "with keys it says nothing that needs one"
        assert "fake-model" not in (await locked.get("/openapi.json")).text


async def test_the_root_page_opens_no_way_to_generate() -> None:
    async with client_of(FakeEngine(), KEYS) as locked:
        response = await locked.post("/", json={"inputs": "a"}, headers=HTML)
    assert response.status_code == 401


async def test_who_names_a_request_can_ask_about_it_before_its_first_token(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    ids = set()
    for _ in range(2):  # the same name twice is still two requests
        response = await client.post(
            "/v1/chat/completions", json=body, headers={"x-request-id": "mine"}
        )
        ids.add(response.json()["id"])
    assert len(ids) == 2 and all(name.startswith("chatcmpl-mine-") for name in ids)
    assert {name.removesuffix("-0") for name in engine.received} == ids
    unnamed = await client.post("/v1/chat/completions", json=body)
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", unnamed.json()["id"])


def test_the_pages_are_in_the_package() -> None:
    root = Path(octavo.server.__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        p for pattern in patterns["package-data"]["octavo"] for p in (root / "octavo").glob(pattern)
    }
    assert set((root / "octavo" / "server" / "pages").iterdir()) <= listed
