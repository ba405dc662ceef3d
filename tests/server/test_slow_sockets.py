"""Writes that block: deltas gather into few writes, the buffer is bounded, nothing is lost."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from server.helpers import CONFIG

from octavo.server import create_app
from octavo.testing.fake_engine import FakeEngine, FakeScript


class BlockedSocket:
    """An ASGI client that takes the first events and then none until it is told to."""

    def __init__(self, body: dict[str, Any]):
        self._body: bytes | None = json.dumps(body).encode()
        self.writes: list[bytes] = []
        self.blocked = asyncio.Event()
        self.open = asyncio.Event()
        self.gone = asyncio.Event()

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.blocked.set()
            await self.open.wait()
            self.writes.append(message["body"])

    async def run(self, engine: FakeEngine) -> None:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await create_app(engine, CONFIG)(scope, self.receive, self.send)

    @property
    def text(self) -> str:
        frames = b"".join(self.writes).decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)


REPLY = "0123456789" * 350
ENGINE_SCRIPT = FakeScript(reply=lambda prompt, index: REPLY)
BODY = {"prompt": "Hi", "max_tokens": 3500, "stream": True}


async def test_many_deltas_few_writes() -> None:
    engine, socket = FakeEngine(ENGINE_SCRIPT), BlockedSocket(BODY)
    running = asyncio.create_task(socket.run(engine))
    await socket.blocked.wait()
    while engine.num_generation_tokens < 1024:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert engine.num_generation_tokens <= 1030  # the rest waits in the engine
    socket.open.set()
    await running
    assert socket.text == REPLY
    assert len(max(socket.writes, key=len)) > 100_000


async def test_client_that_leaves_while_a_write_hangs() -> None:
    engine, socket = FakeEngine(ENGINE_SCRIPT), BlockedSocket(BODY)
    running = asyncio.create_task(socket.run(engine))
    await socket.blocked.wait()
    socket.gone.set()
    while engine.live:
        await asyncio.sleep(0)
    assert len(engine.aborted) == 1
    socket.open.set()
    await running
