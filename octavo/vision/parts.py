"""Messages whose content is a list of parts, some of them images. Knows no sockets.

Clients write an image as {"type": "image_url", "image_url": {"url": "data:..."}}, Python callers
also as {"type": "image_pil", "image_pil": picture}; chat templates know it as {"type": "image"}.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidImageError, RequestError
from octavo.vision.data_urls import read_data_url, url_in
from octavo.vision.prompts import IMAGE_PART, ImageReader, check_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def pictures_of(
    messages: Sequence[Mapping[str, Any]], reader: ImageReader, *, as_parts: bool
) -> "tuple[list[dict[str, Any]], list[Image]]":
    """(the messages as chat templates know them, their pictures in order)

    Args:
        messages: a conversation.
        reader: that of the model.
        as_parts: the model's template goes through parts, and would leave a plain text out.

    Raises:
        InvalidImageError: an image that cannot be read.
        RequestError: a part of another type.
    """
    images: list[Image] = []
    turns = []
    for message in messages:
        turn = dict(message)
        content = turn.get("content")
        if isinstance(content, list):
            turn["content"] = [_part(part, reader, images) for part in content]
        turns.append(with_parts(turn) if as_parts else turn)
    return turns, images


def with_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as the one part of its content."""
    content = turn.get("content")
    if not isinstance(content, str):
        return turn
    return turn | {"content": [{"type": "text", "text": content}]}


def _part(part: Any, reader: ImageReader, images: "list[Image]") -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return dict(part)
    if kind == "image_pil":
        check_picture(part.get("image_pil"))
        images.append(part["image_pil"])
    elif kind == "image_url":
        url = url_in(part.get("image_url"))
        if url is None:
            raise InvalidImageError("an image_url part needs image_url: {'url': '...'}")
        images.append(reader.decode(read_data_url(url, max_bytes=reader.limits.max_bytes)))
    else:
        raise RequestError(
            f"a part of a message is of type text, image_url or image_pil, not {kind!r}",
            param="messages",
        )
    return dict(IMAGE_PART)
