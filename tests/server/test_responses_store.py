"""What is kept of responses, whose it is, and how much there may be."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.helpers import CONFIG, client_of
from server.test_responses import URL, create, ended
from server.test_server_keys import bearer, entry

from octavo.errors import ConfigError
from octavo.server import ServerConfig, create_app
from octavo.server.responses_protocol import InputItem
from octavo.server.responses_store import ResponseStore, StoredResponse
from octavo.testing.fake_engine import FakeEngine


async def test_owners(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        entry("a", "k-a", tenant="one")
        + entry("b", "k-b", tenant="one")
        + entry("c", "k-c", tenant="two")
        + entry("d", "k-d")
        + entry("e", "k-e")
    )
    config = ServerConfig(api_key_file=str(path))
    async with client_of(FakeEngine(), config) as client:

        async def post(key: str, **fields: Any) -> httpx.Response:
            return await client.post(URL, json={"input": "Hi"} | fields, headers=bearer(key))

        ids = {key: (await post(key)).json()["id"] for key in ("k-a", "k-d")}
        allowed = {"k-a": ("k-a", "k-b"), "k-d": ("k-d",)}
        for owner, response_id in ids.items():
            for key in ("k-a", "k-b", "k-c", "k-d", "k-e"):
                is_allowed = key in allowed[owner]
                one = f"{URL}/{response_id}"
                status = (await client.get(one, headers=bearer(key))).status_code
                assert status == (200 if is_allowed else 404)
                follow_up = await post(key, previous_response_id=response_id)
                assert follow_up.status_code == (200 if is_allowed else 400)
                if not is_allowed:
                    for method, url in (("DELETE", one), ("POST", f"{one}/cancel")):
                        response = await client.request(method, url, headers=bearer(key))
                        assert response.status_code == 404


async def test_a_key_s_allowance_binds_the_background(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("few", "k", max_tokens=100))
    async with client_of(FakeEngine(), ServerConfig(api_key_file=str(path))) as client:
        client.headers.update(bearer("k"))
        first = await ended(
            client, (await create(client, background=True, max_output_tokens=40))["id"]
        )
        assert first["status"] == "completed"
        second = await create(client, background=True, max_output_tokens=40)
        second = await ended(client, second["id"])
        assert second["status"] == "failed" and second["error"]["code"] == "insufficient_quota"


async def test_the_oldest_make_way() -> None:
    config = ServerConfig(max_stored_responses=2)
    engine = FakeEngine()
    async with client_of(engine, config) as client:
        ids = [(await create(client))["id"] for _ in range(3)]
        found = [(await client.get(f"{URL}/{i}")).status_code for i in ids]
        assert found == [404, 200, 200]
        # What runs stays, and no more can run than can be kept.
        engine.script.queue_delay_s = 60
        running = [(await create(client, background=True))["id"] for _ in range(2)]
        response = await client.post(URL, json={"input": "Hi", "background": True})
        assert response.status_code == 503
        while len(engine.live) < 2:
            await asyncio.sleep(0.01)
        engine.script.queue_delay_s = 0
        await create(client)
        for response_id in running:
            assert (await client.get(f"{URL}/{response_id}")).json()["status"] == "queued"
            await client.delete(f"{URL}/{response_id}")
    async with client_of(engine, ServerConfig(max_stored_responses=0)) as client:
        document = await create(client)
        assert (await client.get(f"{URL}/{document['id']}")).status_code == 404


def test_there_cannot_be_fewer_than_none() -> None:
    with pytest.raises(ConfigError, match="max_stored_responses must not be negative"):
        ServerConfig(max_stored_responses=-1)


def test_the_store_is_bounded_in_bytes() -> None:
    store = ResponseStore(max_responses=100, max_bytes=10_000)

    def document(name: str, text: str, status: str = "completed") -> dict[str, Any]:
        return {"id": name, "status": status, "output": [], "text": text}

    def keep(name: str, text: str, status: str = "completed") -> None:
        items = [InputItem(role="user", content=text)]
        store.keep(StoredResponse(document(name, "", status), "", items))
        store.check_integrity()

    for i in range(50):
        keep(str(i), "x" * 1000)
    assert 5 < len(store) < 10 and store.find("49", "") and not store.find("0", "")
    keep("large", "x" * 20_000)
    assert len(store) == 0  # it would not fit alone
    keep("runs", "x", "queued")
    store.update("runs", document("runs", "x" * 9_800, "in_progress"))
    store.check_integrity()
    keep("next", "x" * 1000)
    assert store.find("runs", "") and not store.find("next", "")
    store.update("runs", document("runs", "x" * 100))
    keep("next", "x" * 1000)
    assert store.find("runs", "") and store.find("next", "") and not store.find("next", "other")
    store.delete("runs")
    store.update("runs", document("runs", ""))  # it stays deleted
    assert store.find("runs", "") is None
    store.check_integrity()


async def test_the_background_ends_with_the_server() -> None:
    engine = FakeEngine()
    engine.script.queue_delay_s = 60
    app = create_app(engine, CONFIG)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        async with app.router.lifespan_context(app):
            document = await create(client, background=True)
            await asyncio.sleep(0.01)
            assert engine.live
        assert not engine.live
        assert (await client.get(f"{URL}/{document['id']}")).json()["status"] == "cancelled"
