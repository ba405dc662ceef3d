"""Keys with scopes, tenants and limits: who may ask for what, how often, and for how much."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server.helpers import client_of, eventually, serving
from starlette.routing import Route

from octavo.cli import main
from octavo.errors import ConfigError
from octavo.server import ServerConfig, create_app
from octavo.server.allowance import Allowance, AllowanceError, Usage
from octavo.server.keys import KeyRing, Scope, digest_of, read_key_file
from octavo.testing.fake_engine import FakeEngine

BODY = {"prompt": "Hello", "max_tokens": 5}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def entry(name: str, key: str, **more: object) -> str:
    """A line of the file for a key that tests know."""
    lines = {"name": name, "sha256": digest_of(key.encode())} | more
    return "[[keys]]\n" + "".join(f"{k} = {v!r}\n" for k, v in lines.items())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        entry("user", "k-user")
        + entry("watch", "k-watch", scopes=["metrics"])
        + entry("boss", "k-boss", scopes=["inference", "metrics", "admin"])
    )
    return path


def server_of(path: Path, engine: FakeEngine | None = None, **more: object) -> httpx.AsyncClient:
    return client_of(engine or FakeEngine(), ServerConfig(api_key_file=str(path), **more))


# Public are liveness, and the pages: a browser sends no key when it opens one, and they say nothing
# of this server, its model or its users. `POST /` is TGI's, and generates.
SCOPE_OF_ROUTE = {
    "GET /": "public",
    "/docs": "public",
    "/openapi.json": "public",
    "/health": "public",
    "/v2/health/live": "public",
    "/v2/health/ready": "metrics",
    "/ready": "metrics",
    "/version": "metrics",
    "/metrics": "metrics",
    "/load": "metrics",
    "/server_info": "admin",
    "/debug/experts": "admin",
    "/debug/requests": "admin",
    "/debug/requests/{request_id}": "admin",
    "/reset_prefix_cache": "admin",
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
    "/sleep": "admin",
    "/wake_up": "admin",
    "/is_sleeping": "metrics",
}


async def test_each_route_takes_keys_of_its_scope_and_no_other(key_file: Path) -> None:
    app = create_app(FakeEngine(), ServerConfig(api_key_file=str(key_file)))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert {route.path for route in routes} >= {path.split()[-1] for path in SCOPE_OF_ROUTE}
    async with server_of(key_file) as client:
        for route in routes:
            [method] = (route.methods or set()) - {"HEAD"}
            wanted = SCOPE_OF_ROUTE.get(route.path, "inference")
            wanted = SCOPE_OF_ROUTE.get(f"{method} {route.path}", wanted)
            path = route.path.replace("{model:path}", "fake-model").replace("{model}", "fake-model")
            path = path.replace("{response_id}", "resp_none")
            for key, scopes in (("k-user", {"inference"}), ("k-watch", {"metrics"})):
                status = (await client.request(method, path, headers=bearer(key))).status_code
                allowed = wanted == "public" or wanted in scopes
                assert (status != 403) == allowed, (route.path, key, status)
            assert (await client.request(method, path, headers=bearer("k-boss"))).status_code != 403
            refused = (await client.request(method, path)).status_code == 401
            assert refused == (wanted != "public")


async def test_a_wrong_scope_says_so(key_file: Path) -> None:
    async with server_of(key_file) as client:
        response = await client.get("/metrics", headers=bearer("k-user"))
        error = response.json()["error"]
        assert response.status_code == 403
        assert (error["type"], error["code"]) == ("permission_error", "wrong_scope")


async def test_requests_a_minute(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("slow", "k", requests_per_minute=2))
    async with server_of(path) as client:
        for left in ("1", "0"):
            response = await client.post("/v1/completions", json=BODY, headers=bearer("k"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
        response = await client.post("/v1/completions", json=BODY, headers=bearer("k"))
        assert response.status_code == 429
        assert 25 <= int(response.headers["retry-after"]) <= 30
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        # What costs nothing is not counted.
        assert (await client.get("/v1/models", headers=bearer("k"))).status_code == 200


async def test_tokens_a_minute_are_reserved_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("few", "k", tokens_per_minute=100))
    engine = FakeEngine()
    async with server_of(path, engine) as client:
        body = {"prompt": "Hello", "max_tokens": 80, "stop": "0"}
        response = await client.post("/v1/completions", json=body, headers=bearer("k"))
        used = response.json()["usage"]["total_tokens"]
        assert response.status_code == 200 and used < 30
        response = await client.post("/v1/completions", json=body, headers=bearer("k"))
        assert response.status_code == (200 if 100 - used >= 85 else 429)
        body["max_tokens"] = 60
        assert (
            await client.post("/v1/completions", json=body, headers=bearer("k"))
        ).status_code == 200
        body["max_tokens"] = 95
        response = await client.post("/v1/completions", json=body, headers=bearer("k"))
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert engine.live == set()


async def test_a_refused_request_costs_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("few", "k", tokens_per_minute=100, max_tokens=1000))
    engine = FakeEngine()
    engine.script.max_requests = 0
    async with server_of(path, engine) as client:
        for _ in range(5):
            response = await client.post("/v1/completions", json=BODY, headers=bearer("k"))
            assert response.status_code == 503
        engine.script.max_requests = None
        body = BODY | {"max_tokens": 90}
        response = await client.post("/v1/completions", json=body, headers=bearer("k"))
        assert response.status_code == 200


async def test_a_quota_survives_a_restart(tmp_path: Path) -> None:
    path, usage = tmp_path / "keys.toml", tmp_path / "usage.json"
    path.write_text(entry("trial", "k", max_tokens=25))
    for expected in (200, 200, 429):  # 6 of the prompt and 5 new ones, each with a new server
        config = ServerConfig(api_key_file=str(path), usage_file=str(usage))
        app = create_app(FakeEngine(), config)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
                response = await client.post("/v1/completions", json=BODY, headers=bearer("k"))
                assert response.status_code == expected
    error = response.json()["error"]
    assert error["code"] == "insufficient_quota" and "3 of its 25 tokens left" in error["message"]
    assert "retry-after" not in response.headers


async def test_a_tenants_key_speaks_for_that_tenant_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", "k-a", tenant="blue") + entry("b", "k-b", tenant="red"))
    seen = []

    class Engine(FakeEngine):
        def generate(self, request_id, prompt_token_ids, sampling, options, **more):  # type: ignore[override]
            seen.append(options)
            return super().generate(request_id, prompt_token_ids, sampling, options, **more)

    async with server_of(path, Engine()) as client:
        for key, more in (("k-a", {}), ("k-b", {}), ("k-a", {"cache_salt": "s"}), ("k-a", {})):
            await client.post("/v1/completions", json=BODY | more, headers=bearer(key))
        response = await client.post(
            "/v1/completions", json=BODY | {"tenant": "red"}, headers=bearer("k-a")
        )
    assert [options.tenant for options in seen] == ["blue", "red", "blue", "blue"]
    assert len({options.cache_salt for options in seen}) == 3 and None not in seen
    assert seen[0].cache_salt == seen[3].cache_salt
    assert response.status_code == 403 and response.json()["error"]["param"] == "tenant"


async def test_keys_without_a_tenant_share_no_prefixes_and_an_open_server_shares_all(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        "".join(
            [
                entry("a", "k-a"),
                entry("b", "k-b"),
                entry("c", "k-c", tenant="a"),  # the tenant is not the key of that name
                entry("d", "k-d", tenant="a"),
            ]
        )
    )
    salts: dict[str, str | None] = {}

    class Engine(FakeEngine):
        def generate(self, request_id, prompt_token_ids, sampling, options, **more):  # type: ignore[override]
            salts[f"{name}{options.tenant}"] = options.cache_salt
            return super().generate(request_id, prompt_token_ids, sampling, options, **more)

    async with server_of(path, Engine()) as client:
        for name in ("k-a ", "k-b ", "k-c ", "k-d "):
            await client.post("/v1/completions", json=BODY, headers=bearer(name.strip()))
        name, more = "k-a told ", {"cache_salt": "s", "tenant": "whoever"}
        await client.post("/v1/completions", json=BODY | more, headers=bearer("k-a"))
    async with client_of(Engine()) as client:
        name = "nobody"
        await client.post("/v1/completions", json=BODY)
    assert salts["k-c a"] == salts["k-d a"]
    assert len({salts[of] for of in ("k-a ", "k-b ", "k-c a", "k-a told whoever")}) == 4
    assert None not in list(salts.values())[:-1] and salts["nobody"] is None


def test_a_key_is_revoked_while_the_server_runs(key_file: Path) -> None:
    clock = Clock()
    ring = KeyRing(ServerConfig(api_key_file=str(key_file)), clock=clock)
    assert ring.find(b"k-user") is not None and ring.find(b"k-nobody") is None
    key_file.write_text(entry("other", "k-other"))
    os.utime(key_file, ns=(1, 1))
    assert ring.find(b"k-user") is not None, "not looked at in the same second"
    clock.now_s += 2
    assert ring.find(b"k-user") is None and ring.find(b"k-other") is not None
    key_file.write_text("[[keys]]\nname = 'broken'")
    clock.now_s += 2
    assert ring.find(b"k-other") is not None, "a wrong file changes nothing"


def test_an_unchanged_key_keeps_what_is_left_of_its_allowance(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.toml", Clock()
    path.write_text(entry("one", "k", requests_per_minute=1))
    ring = KeyRing(ServerConfig(api_key_file=str(path)), clock=clock)
    before = ring.find(b"k")
    assert before is not None
    before.allowance.admit()
    path.write_text(path.read_text() + entry("two", "k2"))
    clock.now_s += 2
    after = ring.find(b"k")
    assert ring.find(b"k2") is not None and after is before
    with pytest.raises(AllowanceError):
        after.allowance.admit()


WRONG_FILES = {
    "is wrong": "keys = 3",
    "unknown field": entry("a", "k", color="blue"),
    "two keys with the name a": entry("a", "k") + entry("a", "k2"),
    "two keys with the sha256": entry("a", "k") + entry("b", "k"),
    "needs scopes": entry("a", "k", scopes=[]),
    "public": entry("a", "k", scopes=["public"]),
    "sha256": "[[keys]]\nname = 'a'\nsha256 = 'plain text key'\n",
    "requests_per_minute": entry("a", "k", requests_per_minute=0),
}


@pytest.mark.parametrize("reason", WRONG_FILES)
def test_wrong_files_are_refused_at_the_start(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(WRONG_FILES[reason])
    with pytest.raises(ConfigError, match="keys.toml"):
        KeyRing(ServerConfig(api_key_file=str(path)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        KeyRing(ServerConfig(api_key_file=str(tmp_path / "none.toml")))
    with pytest.raises(ConfigError, match="api_key_file"):
        ServerConfig(usage_file="usage.json")


@pytest.fixture
def allowance() -> Iterator[tuple[Allowance, Clock]]:
    clock = Clock()
    yield Allowance("a", Usage(None), tokens_per_minute=60, clock=clock), clock


def test_a_bucket_refills_steadily(allowance: tuple[Allowance, Clock]) -> None:
    tokens, clock = allowance
    tokens.reserve(60).settle(60)
    with pytest.raises(AllowanceError) as caught:
        tokens.reserve(10)
    assert caught.value.retry_after_s == pytest.approx(10)
    clock.now_s += 10
    tokens.reserve(10).settle(25)  # more than was thought: it is owed
    with pytest.raises(AllowanceError) as caught:
        tokens.reserve(1)
    assert caught.value.retry_after_s == pytest.approx(16)
    clock.now_s += 1000
    tokens.reserve(60)


def test_what_is_larger_than_a_minutes_worth_waits_for_a_full_bucket(
    allowance: tuple[Allowance, Clock],
) -> None:
    tokens, clock = allowance
    tokens.reserve(1000).settle(30)
    with pytest.raises(AllowanceError) as caught:
        tokens.reserve(1000)
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now_s += 30
    tokens.reserve(1000)


def test_the_command_makes_a_key_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    flags = ["--file", str(path), "--scope", "inference", "metrics", "--tokens-per-minute", "5"]
    assert main(["keys", "first", *flags]) == 0
    assert main(["keys", "second", "--file", str(path), "--tenant", "blue"]) == 0
    said = capsys.readouterr()
    first, second = said.out.split()
    assert f"octavo serve --api-key-file {path}" in said.err and first not in said.err
    assert path.stat().st_mode & 0o777 == 0o600
    assert first not in path.read_text() and second not in path.read_text()
    ring = KeyRing(ServerConfig(api_key_file=str(path)))
    found = ring.find(first.encode())
    assert found is not None and found.scopes == {Scope.INFERENCE, Scope.METRICS}
    assert found.entry.tokens_per_minute == 5
    assert main(["keys", "first", "--file", str(path)]) == 1, "the name is taken"
    assert len(read_key_file(path)) == 2 and list(tmp_path.iterdir()) == [path]


def test_who_goes_away_before_the_first_token_pays_for_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("few", "k", max_tokens=100))
    engine = FakeEngine()
    engine.script.queue_delay_s = 0.5
    body = {"prompt": [1] * 80, "max_tokens": 10}
    with serving(engine, ServerConfig(api_key_file=str(path))) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer("k"), timeout=0.1)
        eventually(lambda: bool(engine.aborted) and not engine.live)
        engine.script.queue_delay_s = 0.0
        response = httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer("k"))
    assert response.status_code == 429
    assert "20 of its 100 tokens left" in response.json()["error"]["message"]
