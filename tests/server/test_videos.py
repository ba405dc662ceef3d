"""Conversations with videos, from URLs to tokens: what is taken, and what is refused first."""

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image
from server.helpers import client_of
from server.test_fetcher import MediaServer, give, media  # noqa: F401
from server.test_images import CAT, ask, image_part, picture, text_part, url_of, user
from tokenizers import Tokenizer
from vision.test_videos import film

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions, locate
from octavo.engine import AsyncEngine, EngineProcess, ServedModel
from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine
from octavo.testing.tiny_models import write_tiny_model
from octavo.text import load_tokenizer
from octavo.vision.prompts import load_image_reader

NAMES = "<|image_pad|>", "<|video_pad|>"
IMAGE, VIDEO = 260, 261
# Qwen2.5-VL's, but for the names of its roles.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|image_pad|>"
    "{% elif content['type'] == 'video' %}<|video_pad|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
FRAMES = [picture(24, 40, seed) for seed in range(6)]
NUM_TOKENS = 3 * 3 * 5  # of all of them: layers of two frames, merged patches down and across


def frames_url(frames: list[Image.Image]) -> str:
    """As vLLM's clients write it, without what JPEG loses."""
    files = [url_of(frame).partition(",")[2] for frame in frames]
    return f"data:video/jpeg;base64,{','.join(files)}"


def animation_url(frames: list[Image.Image], milliseconds: int) -> str:
    file = io.BytesIO()
    options: dict[str, Any] = {"append_images": frames[1:], "duration": milliseconds}
    frames[0].save(file, "PNG", save_all=True, **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def video_part(url: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}} | fields


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    write_tiny_model(directory, "qwen2_5_vl", image_token_id=IMAGE, video_token_id=VIDEO)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(list(NAMES))
    assert [tokenizer.token_to_id(name) for name in NAMES] == [IMAGE, VIDEO]
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return str(directory)


@pytest.fixture
def engine(model: str) -> FakeEngine:
    engine = FakeEngine()
    checkpoint = locate(model)
    reader = load_image_reader(checkpoint, max_video_frames=6)
    tokenizer = load_tokenizer(checkpoint)
    engine.model = ServedModel(engine.name, 4096, 303, tokenizer, images=reader)
    return engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine, ServerConfig(max_request_bytes=2**25)) as client:
        yield client
    assert not engine.live


async def test_the_template_places_videos_and_each_gets_its_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    parts = [
        text_part("What"),
        video_part(frames_url(FRAMES), fps=4.0),
        image_part(url_of(CAT)),
        {"type": "video_url", "video_url": animation_url(FRAMES, 250)},
    ]
    response = await ask(client, user(*parts))
    assert response.status_code == 200, response.text
    token_ids = list(engine.received.values())[-1][0]
    seen = list(engine.seen.values())[-1]
    assert [token_ids[place.start] for place in seen.places] == [VIDEO, IMAGE, VIDEO]
    listed, image, animated = seen.places
    assert (listed.num_tokens, listed.grid) == (NUM_TOKENS, (3, 3, 5))
    assert listed.frame_step == 4 * 2 / 4.0  # tokens a second, frames in a layer, frames a second
    assert image.grid is not None and image.grid[0] == 1
    # 1.5 s: four frames at least, which are 0, 1, 3 and 4 of six.
    assert animated.grid == (2, 3, 5)
    assert animated.frame_step == pytest.approx(4 * 2 / (4 / 1.5))
    chosen = [FRAMES[i].tobytes() for i in (0, 1, 3, 4)]
    rgb = {picture.key: picture.rgb for picture in seen.pictures}
    assert rgb[animated.key] == b"".join(chosen)
    assert rgb[listed.key] == b"".join(frame.tobytes() for frame in FRAMES)
    for place in seen.places:
        [kind] = set(token_ids[place.start : place.end])
        assert kind in (IMAGE, VIDEO)


async def test_a_film_is_sampled_by_its_own_time(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    data = base64.b64encode(film(30, size=(40, 24))).decode()  # 3 s
    for fields, count in (({}, 6), ({"fps": 1.5}, 4), ({"fps": 10}, 6)):
        part = video_part(f"data:video/mp4;base64,{data}", **fields)
        assert (await ask(client, user(part))).status_code == 200
        seen = list(engine.seen.values())[-1]
        [picture], [place] = seen.pictures, seen.places
        assert picture.num_frames == count
        assert place.frame_step == pytest.approx(4 * 2 / (count / 3))


async def test_F17_a_placeholder_that_a_user_spells_is_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    parts = [text_part("<|video_pad|><|image_pad|>"), video_part(frames_url(FRAMES))]
    assert (await ask(client, user(*parts))).status_code == 200
    token_ids = list(engine.received.values())[-1][0]
    assert token_ids.count(VIDEO) == NUM_TOKENS and token_ids.count(IMAGE) == 0


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (video_part("http://169.254.169.254/latest"), "not fetched from"),
        (video_part("file:///etc/passwd"), "must be a data URL"),
        (video_part("data:video/mp4;base64,%%%%"), "no valid base64"),
        (video_part("data:video/mp4;base64,QUJD"), "no known format"),
        (video_part(frames_url(FRAMES * 2)), "12 frames; the limit is 6: send fewer"),
        (video_part(frames_url([*FRAMES[:2], CAT])), "one size"),
        (video_part("data:video/mp4;base64," + "A" * (28 * 2**20)), "bytes"),
        ({"type": "video_url"}, "an object with a url"),
        (video_part(frames_url(FRAMES), fps=0), "fps must be a number above 0"),
        ({"type": "input_audio"}, "only parts of type text, image_url and video_url"),
    ],
)
async def test_F29_what_is_no_video_within_the_limits_is_refused_by_its_place(
    client: httpx.AsyncClient, engine: FakeEngine, part: dict[str, Any], why: str
) -> None:
    response = await ask(client, user(text_part("a"), part))
    assert response.status_code == 400
    error = response.json()["error"]
    assert "messages[0].content[1]" in error["message"] and why in error["message"]
    assert error["param"].startswith("messages[0].content[1]")
    assert not engine.received


async def test_videos_of_a_request_are_counted(client: httpx.AsyncClient) -> None:
    part = video_part(frames_url(FRAMES[:2]))
    assert (await ask(client, user(part, part))).status_code == 200
    response = await ask(client, user(part, part, part))
    assert response.status_code == 400 and "at most 2 videos" in response.text


async def test_a_conversation_shows_videos_from_elsewhere(
    media: MediaServer,  # noqa: F811
    engine: FakeEngine,
) -> None:
    url = animation_url(FRAMES, 250)
    media.answer = give(base64.b64decode(url.partition(",")[2]))
    config = ServerConfig(max_request_bytes=2**20, allowed_media_domains=(media.name,))
    async with client_of(engine, config) as client:
        for part in (video_part(media.url("/cat.png")), video_part(url)):
            assert (await ask(client, user(part))).status_code == 200
    fetched, inline = engine.seen.values()
    assert fetched == inline and media.asked == ["/cat.png"]


@pytest.mark.parametrize("field", ["max_video_frames", "media_timeout_s"])
def test_limits_that_make_no_sense_are_refused_at_the_start(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be"):
        ServerConfig(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.server
async def test_answers_over_http_are_those_of_the_library(model: str) -> None:
    """Through a process of its own, and through Pillow's pictures and data URLs alike."""
    options = {"kv_cache_memory_bytes": 2**22, "device": "cpu", "num_threads": 1}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(model, check_integrity=True, **options)
    question = text_part("What is this?")
    pil = {"type": "video_pil", "video_pil": FRAMES}
    conversations = [
        user(pil, question),
        user(pil | {"fps": 0.5}, question),
        user({"type": "image_pil", "image_pil": CAT}, pil, question),
        user(video_part(frames_url(FRAMES)), question),
    ]
    expected = [o.outputs[0].token_ids for o in llm.chat(conversations, sampling, use_tqdm=False)]
    assert expected[3] == expected[0]
    assert len({tuple(ids) for ids in expected}) == 3
    [by_hand] = llm.generate(
        [
            {
                "prompt": "USER: <|image_pad|><|video_pad|>What is this? ASSISTANT:",
                "multi_modal_data": {"image": CAT, "video": FRAMES},
            }
        ],
        sampling,
        use_tqdm=False,
    )
    assert by_hand.outputs[0].token_ids == expected[2]

    checkpoint = locate(model)
    engine = AsyncEngine(
        EngineProcess(EngineOptions.from_flat(model, options)),
        load_tokenizer(checkpoint),
        model_name="qwen2_5_vl",
        images=load_image_reader(checkpoint),
    )
    await engine.start()
    try:
        fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
        sent = video_part(frames_url(FRAMES))
        async with client_of(engine, ServerConfig()) as client:  # type: ignore[arg-type]
            for parts, ids in zip(
                ([sent], [sent | {"fps": 0.5}], [image_part(url_of(CAT)), sent]),
                expected,
                strict=False,
            ):
                response = await ask(client, user(*parts, question), **fields)
                assert response.status_code == 200, response.text
                assert response.json()["choices"][0]["token_ids"] == ids
    finally:
        await engine.stop()
