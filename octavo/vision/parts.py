"""Messages whose content is a list of parts, some of them images. Knows no sockets.

Clients write an image as {"type": "image_url", "image_url": {"url": "data:..."}}, Python callers
also as {"type": "image_pil", "image_pil": picture}; chat templates know it as {"type": "image"}.
Videos are the same with `video` in the place of `image`, and perhaps {"fps": 2.0} beside it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidImageError, RequestError
from octavo.vision.data_urls import read_data_url, read_video_url, url_in
from octavo.vision.prompts import IMAGE_PART, VIDEO_PART, ImageReader, check_picture, video_of
from octavo.vision.videos import Video, check_fps

if TYPE_CHECKING:
    from PIL.Image import Image


def pictures_of(
    messages: Sequence[Mapping[str, Any]], reader: ImageReader, *, as_parts: bool
) -> "tuple[list[dict[str, Any]], list[Image], list[Video]]":
    """(the messages as chat templates know them, their pictures and videos in order)

    Args:
        messages: a conversation.
        reader: that of the model.
        as_parts: the model's template goes through parts, and would leave a plain text out.

    Raises:
        InvalidImageError: an image or a video that cannot be read.
        RequestError: a part of another type.
    """
    images: list[Image] = []
    videos: list[Video] = []
    turns = []
    for message in messages:
        turn = dict(message)
        content = turn.get("content")
        if isinstance(content, list):
            turn["content"] = [_part(part, reader, images, videos) for part in content]
        turns.append(with_parts(turn) if as_parts else turn)
    return turns, images, videos


def with_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as the one part of its content."""
    content = turn.get("content")
    if not isinstance(content, str):
        return turn
    return turn | {"content": [{"type": "text", "text": content}]}


def _part(
    part: Any, reader: ImageReader, images: "list[Image]", videos: list[Video]
) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return dict(part)
    if kind == "image_pil":
        check_picture(part.get("image_pil"))
        images.append(part["image_pil"])
    elif kind == "image_url":
        url = _url(part, kind)
        images.append(reader.decode(read_data_url(url, max_bytes=reader.limits.max_bytes)))
    elif kind == "video_pil":
        videos.append(video_of(part.get("video_pil"), reader, check_fps(part.get("fps"))))
    elif kind == "video_url":
        reader.video_reader()
        data = read_video_url(_url(part, kind), max_bytes=reader.limits.max_bytes)
        videos.append(reader.decode_video(data, check_fps(part.get("fps"))))
    else:
        raise RequestError(
            "a part of a message is of type text, image_url, image_pil, video_url or video_pil, "
            f"not {kind!r}",
            param="messages",
        )
    return dict(VIDEO_PART if kind.startswith("video") else IMAGE_PART)


def _url(part: Mapping[str, Any], kind: str) -> str:
    url = url_in(part.get(kind))
    if url is None:
        raise InvalidImageError(f"a part of type {kind} needs {kind}: {{'url': '...'}}")
    return url
