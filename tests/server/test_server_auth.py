"""F33: no route is reachable without the key, whatever the path and the headers look like."""

from collections.abc import AsyncIterator

import httpx
import pytest
from server.helpers import client_of
from starlette.routing import Route

from octavo.errors import ConfigError
from octavo.server import ServerConfig, create_app
from octavo.testing.fake_engine import FakeEngine

KEY = "correct horse battery staple"
CONFIG = ServerConfig(api_key=KEY, served_model_name=("alias",))
APP = create_app(FakeEngine(), CONFIG)
ROUTES = [
    (method, route.path.replace("{model:path}", "fake-model").replace("{model}", "fake-model"))
    for route in APP.routes
    if isinstance(route, Route)
    for method in sorted(route.methods or ())
]


# Liveness, and what is the same on every server: pages that browsers open, which send no key then.
OPEN = ("/health", "/v2/health/live", "/", "/docs", "/openapi.json")


@pytest.fixture
async def locked() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(FakeEngine(), CONFIG) as client:
        yield client


def test_the_walk_sees_all_routes() -> None:
    num_gets = sum("GET" in (route.methods or ()) for route in APP.routes)
    assert len(ROUTES) == len(APP.routes) + num_gets > 60  # each GET brings a HEAD
    assert ("POST", "/v1/chat/completions") in ROUTES


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_route_walk(locked: httpx.AsyncClient, method: str, path: str) -> None:
    without = await locked.request(method, path)
    key = {"authorization": f"Bearer {KEY}"}
    with_key = await locked.request(method, path, headers=key)
    assert with_key.status_code != 401
    if path in OPEN and method != "POST":
        assert without.status_code == 200
    else:
        assert without.status_code == 401
        assert without.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            error = without.json()["error"]
            assert error["type"] == "authentication_error"
            assert error["code"] == "invalid_api_key"
            assert KEY not in without.text


WRONG = [
    "Bearer wrong",
    "Bearer",
    "Bearer ",
    "bearer wrong",
    f"Bearer {KEY}x",
    f"Bearer {KEY[:-1]}",
    f"Basic {KEY}",
    KEY,
    f"Bearer{KEY}",
    "Bearer \u00e9",
]


@pytest.mark.parametrize("value", WRONG)
async def test_wrong_keys(locked: httpx.AsyncClient, value: str) -> None:
    headers = {"authorization": value.encode("latin-1")}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 401


async def test_scheme_has_no_case(locked: httpx.AsyncClient) -> None:
    headers = {"authorization": f"bearer {KEY}"}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 200


TRICKS = ["//v1/models", "/v1%2fmodels", "/%76%31/models", "/health/../v1/models", "/v1/models/"]
TRICKS += [
    "/health/",
    "//health",
    "/health%2f..%2fv1/models",
    "/docs/",
    "/docs/../version",
    "/nope",
]


@pytest.mark.parametrize("path", TRICKS)
async def test_path_tricks(locked: httpx.AsyncClient, path: str) -> None:
    url = httpx.URL("http://octavo").copy_with(raw_path=path.encode())
    assert (await locked.get(url)).status_code == 401


@pytest.mark.parametrize("path", OPEN)
async def test_a_path_is_open_to_readers_only(locked: httpx.AsyncClient, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert (await locked.request(method, path)).status_code == 401


@pytest.mark.parametrize("host", ["octavo/health?", "health", "x/v1?", "octavo/health#"])
async def test_host_tricks(locked: httpx.AsyncClient, host: str) -> None:
    assert (await locked.get("/v1/models", headers={"host": host})).status_code == 401


async def test_wrong_key_is_refused_before_the_body_is_read(locked: httpx.AsyncClient) -> None:
    response = await locked.post("/v1/completions", content=b"not json at all")
    assert response.status_code == 401
    assert response.headers["connection"] == "close"


async def test_aliases(locked: httpx.AsyncClient) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    models = (await locked.get("/v1/models", headers=headers)).json()["data"]
    assert [card["id"] for card in models] == ["fake-model", "alias"]
    body = {"model": "alias", "prompt": "a"}
    response = await locked.post("/v1/completions", json=body, headers=headers)
    assert response.json()["model"] == "alias"


def test_config() -> None:
    assert KEY not in repr(CONFIG)
    for wrong in (
        {"port": -1},
        {"port": 70_000},
        {"api_key": " "},
        {"served_model_name": ("",)},
        {"max_request_bytes": 0},
        {"drain_timeout_s": -1},
    ):
        with pytest.raises(ConfigError):
            ServerConfig(**wrong)
