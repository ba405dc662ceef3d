"""Adapters over HTTP: names in `model`, loading and unloading, and a real server under traffic."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from faults.processes import Server, serving
from server.helpers import client_of

from octavo.core import Adapter
from octavo.server.config import ServerConfig
from octavo.testing.fake_engine import FakeEngine
from octavo.testing.tiny_adapters import matrices_of, merged, write_adapter
from octavo.testing.tiny_models import write_tiny_model

PROMPT = [(31 * i + 7) % 301 for i in range(40)]
NUM_TOKENS = 12
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def test_the_field_model_names_an_adapter(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"lora_name": "sql", "lora_path": "v1"}
    assert (await client.post(LOAD, json=body)).json() == {
        "status": "ok",
        "lora_name": "sql",
        "version": "v1",
    }
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert cards["sql"]["parent"] == "fake-model" and cards["fake-model"]["parent"] is None
    assert (await client.get("/v1/models/sql")).json() == cards["sql"]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    asked = [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": "Hi"}),
    ]
    for path, fields in asked:
        for name, expected in (("sql", Adapter("sql", "v1")), ("fake-model", None)):
            response = await client.post(path, json=fields | {"model": name})
            assert response.status_code == 200, response.text
            assert response.json()["model"] == name
            assert list(engine.asked_of.values())[-1] == expected, path
    again = await client.post(LOAD, json=body)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert (await client.post(LOAD, json=body | {"load_inplace": True})).status_code == 200
    assert (await client.post(UNLOAD, json={"lora_name": "sql"})).status_code == 200
    for response in (
        await client.post("/v1/completions", json={"prompt": "Hi", "model": "sql"}),
        await client.post(UNLOAD, json={"lora_name": "sql"}),
        await client.get("/v1/models/sql"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "fake-model", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": 3}, "lora_path"),
        ({"lora_name": "x", "lora_path": "x", "base_model": "y"}, None),
    ],
)
async def test_wrong_bodies_are_refused(
    client: httpx.AsyncClient, body: dict[str, object], param: str | None
) -> None:
    response = await client.post(LOAD, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_only_operators_load_and_unload() -> None:
    async with client_of(FakeEngine(), ServerConfig(api_key="secret")) as client:
        for path in (LOAD, UNLOAD):
            assert (await client.post(path, json={})).status_code == 401


class Served:
    """A real server with one adapter at its start and two more in its directory."""

    def __init__(self, server: Server, directory: Path, likeliest: dict[str, list[int]]):
        self.server, self.directory, self.likeliest = server, directory, likeliest

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.server.client.post(f"{self.server.url}{path}", json=body)

    def complete(self, model: str) -> httpx.Response:
        fields = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
        return self.server.complete(model=model, **fields)

    def tokens(self, model: str) -> list[int]:
        response = self.complete(model)
        assert response.status_code == 200, response.text
        tokens: list[int] = response.json()["choices"][0]["token_ids"]
        return tokens


@torch.inference_mode()
def greedy(model: torch.nn.Module) -> list[int]:
    ids = torch.tensor([PROMPT])
    for _ in range(NUM_TOKENS):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    tokens: list[int] = ids[0, len(PROMPT) :].tolist()
    return tokens


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    top = tmp_path_factory.mktemp("served")
    base = write_tiny_model(top / "base", "llama")
    likeliest = {"base": greedy(base)}
    for seed, name in enumerate(("a", "b", "c"), 1):
        path = write_adapter(top / "adapters" / name, matrices_of(base), rank=2 + seed, seed=seed)
        likeliest[name] = greedy(merged(base, path))
    outside = shutil.copytree(top / "adapters" / "a", top / "outside")
    (top / "adapters" / "link").symlink_to(outside)
    mixed = shutil.copytree(top / "adapters" / "a", top / "adapters" / "mixed")
    (mixed / "adapter_model.safetensors").unlink()
    (mixed / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    flags = ["--dtype", "float32", "--enable-lora", "--max-loras", "1"]
    flags += ["--lora-dir", str(top / "adapters"), "--lora-modules", f"a={top / 'adapters' / 'a'}"]
    with serving(top / "base", *flags) as server:
        yield Served(server, top / "adapters", likeliest)


@pytest.mark.server
def test_the_openai_client_names_base_and_adapters(served: Served) -> None:
    url = f"{served.server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["base", "a"]
        for name in ("a", "base", "a"):
            assert served.tokens(name) == served.likeliest[name]
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="nobody", prompt="Hi")
        assert caught.value.code == "model_not_found"


@pytest.mark.server
@pytest.mark.parametrize(
    "path", ["../outside", "link", "mixed", "/etc", ".", "", "nowhere", "a/../../outside", "\0"]
)
def test_nothing_outside_its_directory_is_read(served: Served, path: str) -> None:
    for name in (path, str(served.directory / path) if path else path):
        response = served.post(LOAD, lora_name="x", lora_path=name)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "lora_path"), name
        assert error["message"] == "there is no such directory in lora_dir"


@pytest.mark.server
def test_what_does_not_fit_is_refused_without_a_path(served: Served) -> None:
    broken = served.directory / "broken"
    shutil.copytree(served.directory / "a", broken)
    config = (broken / "adapter_config.json").read_text()
    (broken / "adapter_config.json").write_text(config.replace('"r": 3', '"r": 4'))
    response = served.post(LOAD, lora_name="x", lora_path="broken")
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "has the shape" in message and str(served.directory) not in message
    assert served.tokens("a") == served.likeliest["a"]


@pytest.mark.server
def test_adapters_come_and_go_under_traffic(served: Served) -> None:
    """Every answer is the base's or its adapter's, or a 404; one slot serves them all."""
    wrong: list[str] = []
    counts = {200: 0, 404: 0}
    is_over = threading.Event()

    def ask(name: str) -> None:
        while not is_over.is_set():
            response = served.complete(name)
            counts[response.status_code] += 1
            allowed = [served.likeliest[n] for n in (("b", "c") if name == "x" else (name,))]
            if response.status_code == 200:
                tokens = response.json()["choices"][0]["token_ids"]
                if tokens not in allowed:
                    wrong.append(f"{name}: {tokens}")
            elif name != "x":
                wrong.append(f"{name}: {response.text}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("base", "a", "x", "x")]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert served.post(LOAD, lora_name="x", lora_path="b").status_code == 200
            assert served.tokens("x") == served.likeliest["b"]
            path = str(served.directory / "c")
            response = served.post(LOAD, lora_name="x", lora_path=path, load_inplace=True)
            assert response.status_code == 200
            assert served.tokens("x") == served.likeliest["c"]
            assert served.post(UNLOAD, lora_name="x").status_code == 200
            assert served.complete("x").status_code == 404
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
    assert not wrong
    assert counts[200] > 20 and counts[404] > 0
    served.server.until(served.server.is_at_rest)
    text = served.server.get("/metrics").text
    assert 'octavo_lora_requests_info{max_lora="1",running_lora_adapters="",' in text


@pytest.mark.server
def test_the_engine_sleeps_and_wakes_with_its_adapters(served: Served) -> None:
    for level in (1, 2):
        assert served.post(f"/sleep?level={level}").status_code == 200
        assert served.post(LOAD, lora_name="z", lora_path="c").status_code == 200
        assert served.post("/wake_up").status_code == 200
        for name, expected in (("a", "a"), ("z", "c"), ("base", "base")):
            assert served.tokens(name) == served.likeliest[expected]
        assert served.post(UNLOAD, lora_name="z").status_code == 200
