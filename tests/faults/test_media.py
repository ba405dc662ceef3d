"""Images and videos that mean no good, sent to a real process of a model that sees."""

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import torch
from faults.aftermath import unharmed
from faults.processes import PROMPT, Server, serving
from faults.refused import CHAT, COMPLETIONS
from PIL import Image
from server.test_fetcher import MediaServer, lead_to, serving_media
from server.test_images import image_part, picture, text_part, url_of, user
from server.test_videos import IMAGE, TEMPLATE, VIDEO, animation_url, frames_url, video_part
from tokenizers import Tokenizer

from octavo.testing.tiny_models import reference_logits, write_tiny_model

pytestmark = pytest.mark.server

NUM_GOLDEN_TOKENS = 8  # that `Server.complete` asks for
PNG = "data:image/png;base64,"
CAT = picture(30, 44, 1)
FRAMES = [picture(24, 40, seed) for seed in range(4)]
NAMES = "<|image_pad|>", "<|video_pad|>"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """(a tiny model, what transformers' class of it says to the known prompt)"""
    directory = tmp_path_factory.mktemp("models") / "seeing"
    model = write_tiny_model(directory, "qwen2_5_vl", image_token_id=IMAGE, video_token_id=VIDEO)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(list(NAMES))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    ids = tokenizer.encode(PROMPT).ids
    num_prompt_tokens = len(ids)
    with torch.inference_mode():
        for _ in range(NUM_GOLDEN_TOKENS):
            ids.append(int(reference_logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return directory, ids[num_prompt_tokens:]


@pytest.fixture(scope="module")
def media() -> Iterator[MediaServer]:
    with serving_media() as media:
        yield media


@pytest.fixture(scope="module")
def watcher(seeing: tuple[Path, list[int]], media: MediaServer) -> Iterator[Server]:
    """A server that may fetch from one host, and from a name of it that leads inside."""
    port = media.name.partition(":")[2]
    flags = ["--allowed-media-domains", media.name, f"localhost:{port}"]
    flags += ["--media-timeout-s", "1", "--max-model-len", "256", "--max-video-frames", "8"]
    flags += ["--kv-cache-memory-bytes", str(2**20), "--encoder-cache-memory-bytes", str(2**20)]
    with serving(seeing[0], *flags) as server:
        for _ in range(2):
            for row in REFUSED.values():
                ask(server, *row[0])
            good = [image_part(url_of(CAT)), video_part(animation_url(FRAMES, 250))]
            good += [image_part(media.url()), video_part(frames_url(FRAMES))]
            for part in good:
                assert ask(server, part).status_code == 200
        with ThreadPoolExecutor(8) as pool:  # every thread that decodes, and every KV block
            long = text_part("a" * 150)
            parts = [[image_part(url_of(picture(40, 40, seed))), long] for seed in range(40)]
            answers = pool.map(lambda one: ask(server, *one), parts)
            assert {answer.status_code for answer in answers} == {200}
        yield server


@pytest.fixture
def server(watcher: Server, seeing: tuple[Path, list[int]]) -> Iterator[Server]:
    """The watcher; after the test it must be what it was before."""
    with unharmed(watcher, seeing[1]):
        yield watcher


def ask(server: Server, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"messages": user(*parts), "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    return server.client.post(f"{server.url}{CHAT}", json=body | fields)


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A file of one byte a pixel with these chunks behind its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    written = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        written += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return written


def black(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IDAT", zlib.compress(bytes((width + 1) * height), 9)


def gif(count: int) -> bytes:
    """Frames of one pixel that say a large screen, a few bytes each."""
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return b"GIF89a" + struct.pack("<HHB", 2000, 2000, 0x80) + bytes(8) + frame * count + b";"


def pixels(shape: tuple[int, int]) -> Image.Image:
    """The same bytes, whatever their shape."""
    return Image.frombytes("RGB", shape, bytes(range(192)) * 3)


Row = tuple[tuple[dict[str, Any], ...], str]  # parts of a message, and the code of the error
REFUSED: dict[str, Row] = {
    "F28-one-pixel": ((image_part(encoded(png(1, 1, black(1, 1)))),), "invalid_image"),
    "F28-header": ((image_part(encoded(png(65535, 65535))),), "invalid_image"),
    "F28-bomb": ((image_part(encoded(png(16384, 16384, black(16384, 64)))),), "invalid_image"),
    "F28-truncated": ((image_part(url_of(CAT)[:1000]),), "invalid_image"),
    "F28-frames": ((image_part(encoded(gif(10_000), "image/gif")),), "invalid_image"),
    "F28-together": (
        tuple([image_part(encoded(png(5000, 5000, black(5000, 1))))] * 3),
        "invalid_image",
    ),
    "F29-animation": ((video_part(encoded(gif(700), "video/gif")),), "invalid_image"),
    "F29-film": ((video_part(encoded(b"\0\0\0\x18ftypisom" + bytes(4096))),), "invalid_image"),
    "F29-many": ((video_part(frames_url(FRAMES * 3)),), "invalid_image"),
    "F29-audio": (
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},),
        "unsupported_parameter",
    ),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_F28_F29_media_that_mean_no_good_are_refused_before_they_cost(
    server: Server, row: Row
) -> None:
    parts, code = row
    response = ask(server, text_part("a"), *parts)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"].startswith("messages")
    assert len(error["message"]) < 400


def test_F29_a_body_over_the_cap_is_refused_while_it_comes(server: Server) -> None:
    response = ask(server, video_part("data:video/mp4;base64," + "A" * 2**24))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_F17_text_that_spells_image_tokens_is_text(server: Server) -> None:
    text = "".join(NAMES)
    response = ask(server, text_part(text))
    assert response.status_code == 200, response.text
    rendered = f"USER: {text} ASSISTANT:"
    assert response.json()["usage"]["prompt_tokens"] == len(rendered)  # a byte each
    beside = ask(server, text_part(text), image_part(url_of(CAT))).json()["usage"]
    alone = ask(server, image_part(url_of(CAT))).json()["usage"]
    assert beside["prompt_tokens"] == alone["prompt_tokens"] + len(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1/",
        "http://{host}:1/",
        "http://localhost:{port}/inside",  # is allowed, and leads inside
        "http://[::1]:{port}/inside",
        "http://[::ffff:127.0.0.1]:{port}/inside",
        "http://2130706433:{port}/inside",
        "http://127.1:{port}/inside",
        "http:\\\\127.0.0.1:{port}\\inside",
        "http://user@127.0.0.1:{port}/inside",
        "file:///etc/passwd",
        "ftp://127.0.0.1:{port}/inside",
        "//127.0.0.1:{port}/inside",
    ],
)
def test_F27_addresses_that_nobody_listed_are_not_asked(
    server: Server, media: MediaServer, url: str
) -> None:
    host, port = media.name.split(":")
    asked = len(media.asked)
    for part in (image_part, video_part):
        response = ask(server, part(url.format(host=host, port=port)))
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "media_url_not_allowed", response.text
    assert len(media.asked) == asked


def test_F27_a_redirect_does_not_lead_to_others(server: Server, media: MediaServer) -> None:
    answer = media.answer
    try:
        with serving_media() as inside:
            media.answer = lead_to(inside.url())
            response = ask(server, image_part(media.url()))
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "media_url_not_allowed"
            assert inside.asked == []
    finally:
        media.answer = answer


def test_F30_media_that_trickle_in_hold_nobody_up(server: Server, media: MediaServer) -> None:
    answer = media.answer
    seen: list[float] = []

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
        seen.extend(server.metrics("num_requests_running", "num_requests_waiting"))
        assert server.complete().status_code == 200  # the others go on meanwhile
        while not media.is_over.wait(0.05):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    media.answer = trickle
    try:
        response = ask(server, image_part(media.url("/slow.png")))
    finally:
        media.answer = answer
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "media_timeout"
    assert seen == [0, 0]  # nothing of it is in the scheduler yet


def test_F31_the_same_bytes_in_another_shape_are_another_image(server: Server) -> None:
    shapes = [(24, 8), (8, 24), (12, 16)]
    assert len({pixels(shape).tobytes() for shape in shapes}) == 1
    salt, text = {"cache_salt": str(uuid4()), "logprobs": True}, text_part("a" * 40)
    answers = [ask(server, image_part(url_of(pixels(s))), text, **salt).json() for s in shapes]
    again = [ask(server, image_part(url_of(pixels(s))), text, **salt).json() for s in shapes]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers + again]
    assert cached[:3] == [0, 0, 0] and min(cached[3:]) >= 16
    told = [json.dumps(answer["choices"][0]["logprobs"]) for answer in answers]
    assert len(set(told)) == 3
    assert [json.dumps(answer["choices"][0]["logprobs"]) for answer in again] == told
    gray = Image.new("L", (24, 8), 7)
    fields = {"cache_salt": str(uuid4())}
    for image in (gray, gray.convert("RGB")):  # one picture, whatever file it came in
        usage = ask(server, image_part(url_of(image)), text, **fields).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 16


@pytest.mark.parametrize("embeds", ["AAAA", [[0.0]], {"data": "AAAA", "shape": [2**40]}])
def test_F32_embeddings_in_the_place_of_prompts_are_off(server: Server, embeds: Any) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": PROMPT}),
        (CHAT, {"messages": user(text_part("a"))}),
    ):
        response = server.client.post(f"{server.url}{path}", json=body | {"prompt_embeds": embeds})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt_embeds"
