"""The images of a conversation as clients send them: counted before they are decoded.

Knows no templates and no tokens. What is refused is named by its place in the request.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidImageError
from octavo.server.errors import bad_request
from octavo.server.fetcher import Fetcher
from octavo.server.limits import Limits
from octavo.server.protocol import ContentPart
from octavo.vision import check_image
from octavo.vision.data_urls import read_data_url, url_in
from octavo.vision.prompts import IMAGE_PART, ImageReader

if TYPE_CHECKING:
    from PIL.Image import Image


SCHEMES = ("http:", "https:")


class SentImages:
    """Images in the order of their places. `reader` is None where the model sees none."""

    def __init__(self, reader: ImageReader | None, limits: Limits):
        self._reader = reader
        self._limits = limits
        self._sent: list[tuple[str, str]] = []  # where, and the URL
        self._fetched: dict[str, bytes] = {}  # by URL

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, part: ContentPart, where: str) -> dict[str, Any]:
        """Take an image part; return it as chat templates know it."""
        if self._reader is None:
            raise bad_request(
                f"{where}: this model sees no images, only parts of type text are supported",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        url = url_in(part.image_url)
        if url is None:
            message = f"{where}.image_url must be an object with a url"
            raise bad_request(message, param=f"{where}.image_url")
        if len(self._sent) == self._limits.max_images:
            message = f"at most {self._limits.max_images} images can go into one request"
            raise bad_request(message, param=where)
        self._sent.append((f"{where}.image_url", url))
        return dict(IMAGE_PART)

    async def fetch(self) -> None:
        """Get what is elsewhere, from hosts that the operator allows.

        Raises:
            InvalidImageError: another host, or what comes is too large or too late.
        """
        elsewhere = {url: where for where, url in self._sent if url.startswith(SCHEMES)}
        if not elsewhere or self._reader is None:
            return
        fetcher = Fetcher(
            self._limits.allowed_media_domains,
            self._reader.limits.max_bytes,
            timeout_s=self._limits.media_timeout_s,
        )
        for url, where in elsewhere.items():
            with _naming(where):
                fetcher.check(url)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_result(fetcher, url)) for url in elsewhere]
        for (url, where), task in zip(elsewhere.items(), tasks, strict=True):
            with _naming(where):
                self._fetched[url] = _data_of(task.result())

    def read(self) -> "list[Image]":
        """The pictures. All headers are looked at before the first is decoded: it takes a while.

        Raises:
            InvalidImageError: an image that is none, too large, or too large with the others.
        """
        if self._reader is None:
            return []
        files, num_pixels, limits = [], 0, self._reader.limits
        for where, url in self._sent:
            with _naming(where):
                data = self._fetched.get(url)
                if data is None:
                    data = read_data_url(url, max_bytes=limits.max_bytes)
                header = check_image(data, limits)
            files.append((where, data))
            num_pixels += header.width * header.height
        if num_pixels > self._limits.max_image_pixels:
            raise InvalidImageError(
                f"the images have {num_pixels} pixels together; the limit is "
                f"{self._limits.max_image_pixels}: scale them down",
                param="messages",
            )
        return [_decoded(self._reader, where, data) for where, data in files]


def _decoded(reader: ImageReader, where: str, data: bytes) -> "Image":
    with _naming(where):
        return reader.decode(data)


async def _result(fetcher: Fetcher, url: str) -> bytes | InvalidImageError:
    """A file, or why there is none: one that fails must not leave the others without an end."""
    try:
        return await fetcher.fetch(url)
    except InvalidImageError as error:
        return error


def _data_of(result: bytes | InvalidImageError) -> bytes:
    if isinstance(result, InvalidImageError):
        raise result
    return result


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Name the place in the request, in errors of what stands there."""
    try:
        yield
    except InvalidImageError as error:
        raise InvalidImageError(f"{where}: {error}", param=where, code=error.code) from error
