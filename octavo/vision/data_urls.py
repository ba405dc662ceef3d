"""Images that come inside of a request, as `data:` URLs. Opens nothing."""

import base64
import binascii
import re
from collections.abc import Mapping

from octavo.errors import InvalidImageError

DATA_URL = re.compile(r"data:(?:image/[a-zA-Z0-9.+-]{1,64})?;base64,", re.ASCII)


def url_in(given: object) -> str | None:
    """The URL of an `image_url` part's field: OpenAI has an object there, some clients a string."""
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
            "or https URL of a host that the operator allows"
        )
    # Counted before it is decoded: four characters are three bytes.
    if (len(url) - head.end()) // 4 * 3 > max_bytes + 2:
        raise InvalidImageError(f"the image has more than {max_bytes} bytes: send a smaller one")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImageError("the image's data URL is no valid base64") from error
