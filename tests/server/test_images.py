"""Conversations with images, from data URLs to tokens: what is taken, and what is refused first."""

import base64
import io
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from server.helpers import client_of
from tokenizers import Tokenizer

import octavo
from octavo import LLM, SamplingParams
from octavo.config import EngineOptions, locate
from octavo.engine import AsyncEngine, EngineProcess, ServedModel
from octavo.errors import RequestError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine
from octavo.testing.tiny_models import write_tiny_model
from octavo.text import load_tokenizer
from octavo.vision.prompts import load_image_reader

CHAT = "/v1/chat/completions"
PLACEHOLDER = 260
NUM_TOKENS = 16  # of an image
# That of LLaVA 1.5's processor, but for its names of roles: images first, and parts alone.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def url_of(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


CAT, DOG = picture(30, 44, 1), picture(61, 17, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "llava"
    write_tiny_model(directory, "llava", image_token_index=PLACEHOLDER)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == PLACEHOLDER
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return str(directory)


@pytest.fixture
def engine(model: str) -> FakeEngine:
    engine = FakeEngine()
    checkpoint = locate(model)
    tokenizer, reader = load_tokenizer(checkpoint), load_image_reader(checkpoint)
    engine.model = ServedModel(engine.name, 4096, 303, tokenizer, images=reader)
    return engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine, ServerConfig(max_request_bytes=2**25)) as client:
        yield client
    assert not engine.live


async def ask(client: httpx.AsyncClient, messages: Any, **fields: Any) -> httpx.Response:
    return await client.post(CHAT, json={"messages": messages, "max_tokens": 4} | fields)


def prompt_of(engine: FakeEngine) -> tuple[list[int], str]:
    """(the ids that came last, their text with one placeholder for each image)"""
    token_ids = list(engine.received.values())[-1][0]
    text, last = "", None
    for token_id in token_ids:
        if token_id == PLACEHOLDER:
            text += "" if last == PLACEHOLDER else "[image]"
        else:
            text += chr(engine.model.tokenizer.token_bytes(token_id)[0])
        last = token_id
    return token_ids, text


async def test_the_template_places_images_and_each_gets_its_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    parts = [text_part("What"), image_part(url_of(CAT)), text_part("is this?")]
    again = {"type": "image_url", "image_url": url_of(DOG)}  # some clients leave the object out
    messages = [*user(*parts), {"role": "assistant", "content": "A cat."}, *user(again)]
    response = await ask(client, messages)
    assert response.status_code == 200
    token_ids, text = prompt_of(engine)
    assert text == "USER: [image]\nWhat is this? ASSISTANT: A cat. USER: [image]\nASSISTANT:"
    seen = list(engine.seen.values())[-1]
    assert [place.num_tokens for place in seen.places] == [NUM_TOKENS, NUM_TOKENS]
    for place in seen.places:
        assert token_ids[place.start : place.end] == [PLACEHOLDER] * NUM_TOKENS
    assert token_ids.count(PLACEHOLDER) == 2 * NUM_TOKENS
    assert [picture.rgb for picture in seen.pictures] == [CAT.tobytes(), DOG.tobytes()]
    assert response.json()["usage"]["prompt_tokens"] == len(token_ids)


async def test_responses_take_images_and_remember_them(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    def asked(text: str, *images: Image.Image) -> list[dict[str, Any]]:
        parts = [{"type": "input_text", "text": text}]
        parts += [{"type": "input_image", "image_url": url_of(i), "detail": "auto"} for i in images]
        return [{"role": "user", "content": parts}]

    first = await client.post("/v1/responses", json={"input": asked("What is this?", CAT)})
    assert first.status_code == 200, first.text
    assert prompt_of(engine)[1] == "USER: [image]\nWhat is this? ASSISTANT:"
    follow = {"input": asked("And this?", DOG), "previous_response_id": first.json()["id"]}
    assert (await client.post("/v1/responses", json=follow)).status_code == 200
    seen = list(engine.seen.values())[-1]
    assert [picture.rgb for picture in seen.pictures] == [CAT.tobytes(), DOG.tobytes()]
    damaged = asked("What?", CAT)
    damaged[0]["content"][1]["image_url"] = "https://example.com/cat.png"
    refused = await client.post("/v1/responses", json={"input": damaged})
    error = refused.json()["error"]
    assert refused.status_code == 400 and "not fetched from" in error["message"]
    assert error["param"] == "input" and "messages[" not in error["message"]


async def test_the_same_picture_twice_travels_once(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await ask(client, user(*[image_part(url_of(CAT))] * 3))).status_code == 200
    seen = list(engine.seen.values())[-1]
    assert (len(seen.places), len(seen.pictures)) == (3, 1)


async def test_F17_a_placeholder_that_a_user_spells_is_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for content in ("<image> a", [text_part("<image>"), text_part("a")]):
        assert (await ask(client, [{"role": "user", "content": content}])).status_code == 200
        token_ids, text = prompt_of(engine)
        assert PLACEHOLDER not in token_ids
        assert text.startswith("USER: <image>")
    response = await ask(client, user(text_part("<image>"), image_part(url_of(CAT))))
    assert response.status_code == 200
    assert prompt_of(engine)[1] == "USER: [image]\n<image> ASSISTANT:"


async def test_blip2s_images_come_first_whatever_the_template_says(tmp_path: Path) -> None:
    """With the template of docs/vision.md, which has no place for images."""
    page = (Path(octavo.__file__).parents[1] / "docs" / "vision.md").read_text()
    [template] = re.findall(r"```\n(\{%- for message.*?)\n```", page, re.S)
    write_tiny_model(tmp_path, "blip2")
    (tmp_path / "chat_template.jinja").write_text(template)
    engine, checkpoint = FakeEngine(), locate(str(tmp_path))
    tokenizer, reader = load_tokenizer(checkpoint), load_image_reader(checkpoint)
    engine.model = ServedModel(engine.name, 4096, 303, tokenizer, images=reader)
    async with client_of(engine) as client:
        messages = [
            *user(text_part("What is this?"), image_part(url_of(CAT))),
            {"role": "assistant", "content": "a cat"},
            *user(image_part(url_of(DOG)), text_part("And this?")),
        ]
        response = await ask(client, messages)
    assert response.status_code == 200, response.text
    [(token_ids, *_)] = engine.received.values()
    text = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids[36:])
    assert token_ids[:36] == [302] * 36  # 18 queries an image
    assert text == b"Question: What is this? Answer: a catQuestion: And this? Answer:"


BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x02\x00\x00\x00"
PNG = "data:image/png;base64,"
REFUSED = {
    "F27 an address inside": (image_part("http://169.254.169.254/latest"), "not fetched from"),
    "F27 a file": (image_part("file:///etc/passwd"), "must be a data URL"),
    "F27 another address": (image_part("https://example.com/cat.png"), "not fetched from"),
    "F28 no base64": (image_part(f"{PNG}%%%%"), "no valid base64"),
    "F28 no image": (image_part(f"{PNG}{base64.b64encode(b'text').decode()}"), "format"),
    "F28 a bomb": (image_part(PNG + base64.b64encode(BOMB).decode()), "pixels"),
    "F28 cut off": (image_part(url_of(picture(64, 64))[: len(PNG) + 400]), "damaged or truncated"),
    "F28 too many bytes": (image_part(PNG + "A" * (28 * 2**20)), "bytes"),
    "F29 a video": ({"type": "video_url", "video_url": {"url": PNG}}, "only parts of type"),
    "no url": ({"type": "image_url", "image_url": {"detail": "low"}}, "an object with a url"),
}


@pytest.mark.parametrize(("part", "why"), REFUSED.values(), ids=REFUSED)
async def test_what_is_no_image_within_the_limits_is_refused_by_its_place(
    client: httpx.AsyncClient, engine: FakeEngine, part: dict[str, Any], why: str
) -> None:
    response = await ask(client, user(text_part("a"), part))
    assert response.status_code == 400
    error = response.json()["error"]
    assert "messages[0].content[1]" in error["message"] and why in error["message"]
    assert error["param"].startswith("messages[0].content[1]")
    assert not engine.received
    assert (await ask(client, user(image_part(url_of(CAT))))).status_code == 200


async def test_all_images_of_a_request_together_are_bounded(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await ask(client, user(*[image_part(url_of(CAT))] * 17))
    assert response.status_code == 400 and "at most 16 images" in response.text
    wide = image_part(url_of(Image.new("RGB", (8192, 4096)), "GIF"))
    assert (await ask(client, user(wide, wide))).status_code == 200
    response = await ask(client, user(wide, wide, wide))
    assert response.status_code == 400 and "pixels together" in response.text


async def test_a_prompt_with_images_is_not_cut(client: httpx.AsyncClient) -> None:
    message = user(image_part(url_of(CAT)))
    response = await ask(client, message, truncate_prompt_tokens=12)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "truncate_prompt_tokens"
    assert (await ask(client, message, truncate_prompt_tokens=400)).status_code == 200


@pytest.mark.server
async def test_answers_over_http_are_those_of_the_library(model: str) -> None:
    """Through a process of its own, and through Pillow's pictures and data URLs alike."""
    options = {"kv_cache_memory_bytes": 2**22, "device": "cpu", "num_threads": 1}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(model, check_integrity=True, **options)
    question = text_part("What is this?")
    pil = [{"type": "image_pil", "image_pil": image} for image in (CAT, DOG)]
    conversations = [user(pil[0], question), user(*pil, question), user(question)]
    expected = [o.outputs[0] for o in llm.chat(conversations, sampling, use_tqdm=False)]
    assert len({answer.text for answer in expected}) == 3
    [by_hand] = llm.generate(
        [
            {
                "prompt": "USER: <image>\nWhat is this? ASSISTANT:",
                "multi_modal_data": {"image": CAT},
            }
        ],
        sampling,
        use_tqdm=False,
    )
    assert by_hand.outputs[0].token_ids == expected[0].token_ids
    with pytest.raises(RequestError, match="image_url"):
        llm.chat(user({"type": "audio_url"}), sampling, use_tqdm=False)

    checkpoint = locate(model)
    engine = AsyncEngine(
        EngineProcess(EngineOptions.from_flat(model, options)),
        load_tokenizer(checkpoint),
        model_name="llava",
        images=load_image_reader(checkpoint),
    )
    await engine.start()
    try:
        fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
        async with client_of(engine, ServerConfig()) as client:  # type: ignore[arg-type]
            sent = [image_part(url_of(image)) for image in (CAT, DOG)]
            for parts, answer in zip(
                ([sent[0], question], [*sent, question], [question]), expected, strict=True
            ):
                response = await client.post(CHAT, json={"messages": user(*parts)} | fields)
                assert response.status_code == 200, response.text
                [choice] = response.json()["choices"]
                assert choice["token_ids"] == answer.token_ids
            stream = {"messages": user(*sent, question), "stream": True} | fields
            lines = (await client.post(CHAT, json=stream)).text.splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert text == expected[1].text
    finally:
        await engine.stop()
