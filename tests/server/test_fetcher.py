"""Images from elsewhere: hosts of a list, at every redirect; no way inside; bounded."""

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from server.helpers import client_of
from server.test_images import CAT, ask, engine, image_part, model, user  # noqa: F401

from octavo.errors import ConfigError, InvalidImageError
from octavo.server import ServerConfig
from octavo.server.fetcher import Fetcher
from octavo.testing.fake_engine import FakeEngine

FILE = io.BytesIO()
CAT.save(FILE, "PNG")
PNG = FILE.getvalue()
Answer = Callable[[BaseHTTPRequestHandler], None]


class MediaServer:
    """A host of images that counts who asks."""

    def __init__(self, port: int):
        self.name = f"127.0.0.1:{port}"
        self.asked: list[str] = []
        self.answer: Answer = give(PNG)
        self.is_over = threading.Event()

    def url(self, path: str = "/cat.png") -> str:
        return f"http://{self.name}{path}"


def give(body: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def lead_to(place: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@contextmanager
def serving_media() -> Iterator[MediaServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            media.asked.append(self.path)
            media.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # they end before the test does
    media = MediaServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield media
    finally:
        media.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def media() -> Iterator[MediaServer]:
    with serving_media() as media:
        yield media


def fetcher_for(media: MediaServer, **changes: object) -> Fetcher:
    fields = {"max_bytes": 2**20, "timeout_s": 5.0} | changes
    return Fetcher((media.name,), **fields)  # type: ignore[arg-type]


async def test_a_file_of_a_listed_host_arrives_through_redirects(media: MediaServer) -> None:
    fetcher = fetcher_for(media)
    assert await fetcher.fetch(media.url("/a?b=c")) == PNG
    media.answer = lambda handler: (lead_to("/next") if handler.path == "/first" else give(PNG))(
        handler
    )
    assert await fetcher.fetch(media.url("/first")) == PNG
    assert media.asked == ["/a?b=c", "/first", "/next"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost:{port}/",
        "http://user@127.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://0x7f000001:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "ftp://127.0.0.1:{port}/",
        "http://127.0.0.1:{port}@169.254.169.254/",
        "http://127.0.0.1:{port}\r\n/",
        "http://127.0.0.1:99999/",
    ],
)
async def test_F27_only_hosts_of_the_list_are_asked(media: MediaServer, url: str) -> None:
    with pytest.raises(InvalidImageError):
        await fetcher_for(media).fetch(url.replace("{port}", media.name.split(":")[1]))
    assert media.asked == []


async def test_F27_a_redirect_is_held_to_the_list_again(media: MediaServer) -> None:
    with serving_media() as inside:
        media.answer = lead_to(inside.url())
        with pytest.raises(InvalidImageError, match="not fetched from"):
            await fetcher_for(media).fetch(media.url())
        assert inside.asked == []
    media.answer = lead_to("http://[")
    with pytest.raises(InvalidImageError, match="does not answer"):
        await fetcher_for(media).fetch(media.url())
    media.answer = lead_to("/again")
    with pytest.raises(InvalidImageError, match="more than 3 times"):
        await fetcher_for(media).fetch(media.url())


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%lo", "::ffff:10.0.0.1"]
)
async def test_F27_a_listed_name_that_leads_inside_is_not_followed(
    media: MediaServer, address: str
) -> None:
    port = media.name.split(":")[1]
    fetcher = Fetcher(
        (f"images.example:{port}",),
        2**20,
        resolve=lambda host, port: ["93.184.215.14", address],
    )
    with pytest.raises(InvalidImageError, match="inside of a network"):
        await fetcher.fetch(f"http://images.example:{port}/")
    assert media.asked == []


async def test_F27_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers, opened = [["93.184.215.14"], ["127.0.0.1"]], []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        opened.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    fetcher = Fetcher(("images.example",), 2**20, resolve=lambda host, port: answers.pop(0))
    with pytest.raises(InvalidImageError, match="does not answer"):
        await fetcher.fetch("http://images.example/")
    assert opened == [("93.184.215.14", 80)] and answers == [["127.0.0.1"]]


async def test_a_file_that_is_too_large_or_not_there_is_refused(media: MediaServer) -> None:
    with pytest.raises(InvalidImageError, match="more than 100 bytes"):
        await fetcher_for(media, max_bytes=100).fetch(media.url())
    media.answer = lambda handler: handler.send_error(404)
    with pytest.raises(InvalidImageError, match="status 404"):
        await fetcher_for(media).fetch(media.url())
    media.answer = lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n")
    with pytest.raises(InvalidImageError, match="does not answer"):
        await fetcher_for(media).fetch(media.url())


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1"])
async def test_F30_a_file_that_trickles_in_is_given_up(media: MediaServer, head: bytes) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while not media.is_over.wait(0.02):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    media.answer = trickle
    with pytest.raises(InvalidImageError) as caught:
        await fetcher_for(media, timeout_s=0.3).fetch(media.url())
    assert caught.value.code == "media_timeout"


async def test_a_conversation_shows_images_from_elsewhere(
    media: MediaServer,
    engine: FakeEngine,  # noqa: F811
) -> None:
    config = ServerConfig(max_request_bytes=2**20, allowed_media_domains=(media.name,))
    async with client_of(engine, config) as client:
        inline = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        parts = [image_part(media.url()), image_part(inline), image_part(media.url())]
        assert (await ask(client, user(*parts))).status_code == 200
        assert media.asked == ["/cat.png"]
        seen = list(engine.seen.values())[-1]
        assert len(seen.places) == 3
        assert [picture.rgb for picture in seen.pictures] == [CAT.tobytes()]
        media.answer = give(b"no image")
        response = await ask(client, user(image_part(media.url())))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_image"
        response = await ask(client, user(image_part("http://other.example/")))
        assert response.status_code == 400
        assert "--allowed-media-domains" in response.json()["error"]["message"]
    assert Image.open(io.BytesIO(PNG)).size == CAT.size


@pytest.mark.parametrize("host", ["", "*.example.com", "https://example.com", "Example.com"])
def test_what_is_no_host_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(ConfigError, match="hosts in lower case"):
        ServerConfig(allowed_media_domains=(host,))
