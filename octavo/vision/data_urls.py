"""Images and videos that come inside of a request, as `data:` URLs. Opens nothing."""

import base64
import binascii
import re
from collections.abc import Mapping

from octavo.errors import InvalidImageError

DATA_URL = re.compile(r"data:(?:image/[a-zA-Z0-9.+-]{1,64})?;base64,", re.ASCII)
VIDEO_URL = re.compile(r"data:(?:(?:image|video)/[a-zA-Z0-9.+-]{1,64})?;base64,", re.ASCII)
# What vLLM and its clients write where frames are chosen already: JPEG files, comma by comma.
FRAMES_URL = "data:video/jpeg;base64,"
NOT_ALLOWED = "media_url_not_allowed"  # code of errors


def url_in(given: object) -> str | None:
    """The URL of a part's field: OpenAI has an object there, some clients a string."""
    url = given.get("url") if isinstance(given, Mapping) else given
    return url if isinstance(url, str) else None


def read_data_url(url: str, *, max_bytes: int) -> bytes:
    """The bytes of a `data:` URL (RFC 2397) in base64, whatever type of image it claims.

    Raises:
        InvalidImageError: another kind of URL, more than `max_bytes`, or damaged base64.
    """
    head = DATA_URL.match(url)
    if head is None:
        raise InvalidImageError(
            "an image must be a data URL in base64, such as data:image/png;base64,..., or an http "
            "or https URL of a host that the operator allows",
            code=_code_of(url),
        )
    return _decoded(url[head.end() :], max_bytes, what="image")


def read_video_url(url: str, *, max_bytes: int) -> bytes | list[bytes]:
    """The bytes of a video's `data:` URL, or of its frames. Raises as `read_data_url` does."""
    if url.startswith(FRAMES_URL):
        texts = url.removeprefix(FRAMES_URL).split(",")
        _check_length(sum(map(len, texts)), max_bytes, what="video")
        return [_decoded(text, max_bytes, what="frame") for text in texts]
    head = VIDEO_URL.match(url)
    if head is None:
        raise InvalidImageError(
            "a video must be a data URL in base64, such as data:video/mp4;base64,... or "
            "data:video/jpeg;base64,<frame>,<frame>, or an http or https URL of a host that the "
            "operator allows",
            code=_code_of(url),
        )
    return _decoded(url[head.end() :], max_bytes, what="video")


def _decoded(text: str, max_bytes: int, *, what: str) -> bytes:
    _check_length(len(text), max_bytes, what=what)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImageError(f"the {what}'s data URL is no valid base64") from error


def _code_of(url: str) -> str | None:
    """Of the error for a URL that is not read: damaged data, or something that is elsewhere."""
    return None if url.startswith("data:") else NOT_ALLOWED


def _check_length(num_chars: int, max_bytes: int, *, what: str) -> None:
    """Counted before anything is decoded: four characters are three bytes."""
    if num_chars // 4 * 3 > max_bytes + 2:
        raise InvalidImageError(f"the {what} has more than {max_bytes} bytes: send a smaller one")
