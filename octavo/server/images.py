"""The images and videos of a conversation as clients send them: counted before they are decoded.

Knows no templates and no tokens. What is refused is named by its place in the request.
"""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidImageError
from octavo.server.errors import bad_request
from octavo.server.fetcher import Fetcher
from octavo.server.limits import Limits
from octavo.server.protocol import ContentPart
from octavo.vision import Video, check_image
from octavo.vision.data_urls import read_data_url, read_video_url, url_in
from octavo.vision.prompts import IMAGE_PART, VIDEO_PART, ImageReader
from octavo.vision.videos import check_fps

if TYPE_CHECKING:
    from PIL.Image import Image


SCHEMES = ("http:", "https:")
# Threads of their own: a film takes seconds, and texts of others must not wait for it.
DECODING = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "octavo-decode")
KINDS = {"image_url": IMAGE_PART, "video_url": VIDEO_PART}  # of parts, as templates know them


@dataclass(frozen=True, slots=True)
class _Sent:
    """One part. where: its place in the request."""

    where: str
    url: str
    is_video: bool
    fps: float | None = None


class SentImages:
    """Images and videos in the order of their places. `reader` is None: the model sees none."""

    def __init__(self, reader: ImageReader | None, limits: Limits):
        self._reader = reader
        self._limits = limits
        self._sent: list[_Sent] = []
        self._fetched: dict[str, bytes] = {}  # by URL

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, part: ContentPart, where: str) -> dict[str, Any]:
        """Take a part of one of `KINDS`; return it as chat templates know it."""
        is_video = part.type == "video_url"
        if self._reader is None or (is_video and self._reader.videos is None):
            sees = "sees no images" if self._reader is None else "takes images, not videos"
            supported = "text" if self._reader is None else "text and image_url"
            raise bad_request(
                f"{where}: this model {sees}, only parts of type {supported} are supported",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        url = url_in(part.video_url if is_video else part.image_url)
        if url is None:
            message = f"{where}.{part.type} must be an object with a url"
            raise bad_request(message, param=f"{where}.{part.type}")
        limits, num_before = self._limits, sum(one.is_video == is_video for one in self._sent)
        most, name = (limits.max_videos, "videos") if is_video else (limits.max_images, "images")
        if num_before == most:
            raise bad_request(f"at most {most} {name} can go into one request", param=where)
        with _naming(f"{where}.fps"):
            fps = check_fps(part.fps)
        self._sent.append(_Sent(f"{where}.{part.type}", url, is_video, fps))
        return dict(KINDS[part.type])

    async def fetch(self) -> None:
        """Get what is elsewhere, from hosts that the operator allows.

        Raises:
            InvalidImageError: another host, or what comes is too large or too late.
        """
        elsewhere = {one.url: one.where for one in self._sent if one.url.startswith(SCHEMES)}
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

    def read(self) -> "tuple[list[Image], list[Video]]":
        """The pictures and the videos.

        All headers of images are looked at before the first is decoded: it takes a while.

        Raises:
            InvalidImageError: an image that is none, too large, or too large with the others.
        """
        if self._reader is None:
            return [], []
        files, num_pixels, limits = [], 0, self._reader.limits
        for one in self._sent:
            with _naming(one.where):
                data = self._data(one, limits.max_bytes)
                if isinstance(data, bytes) and not one.is_video:
                    header = check_image(data, limits)
                    num_pixels += header.width * header.height
            files.append((one, data))
        if num_pixels > self._limits.max_image_pixels:
            raise InvalidImageError(
                f"the images have {num_pixels} pixels together; the limit is "
                f"{self._limits.max_image_pixels}: scale them down",
                param="messages",
            )
        images, videos = [], []
        for one, data in files:
            with _naming(one.where):
                if isinstance(data, list) or one.is_video:
                    videos.append(self._reader.decode_video(data, one.fps))
                else:
                    images.append(self._reader.decode(data))
        return images, videos

    def _data(self, one: _Sent, max_bytes: int) -> bytes | list[bytes]:
        if one.url in self._fetched:
            return self._fetched[one.url]
        read = read_video_url if one.is_video else read_data_url
        return read(one.url, max_bytes=max_bytes)


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
