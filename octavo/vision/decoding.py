"""From the bytes of a file to an RGB picture, within limits. Needs Pillow, the extra `vision`.

What the header promises is checked before anything is decoded, the decoder is chosen by us and not
by the file, and whatever it says of damaged data becomes one error that a client can be shown.
"""

from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING

from octavo.errors import ConfigError, InvalidImageError
from octavo.vision.headers import check_image
from octavo.vision.limits import ImageLimits

if TYPE_CHECKING:
    from PIL.Image import Image

HIGH_BYTE = 1 / 256  # of 16-bit gray


def decode_image(data: bytes, limits: ImageLimits) -> "Image":
    """A picture in RGB, the right way up; of an animation the first frame.

    Transparency is dropped, as transformers' processors do, and gray of 16 bits keeps its high
    ones.

    Raises:
        InvalidImageError: not within the limits, in no known format, damaged or truncated.
        ConfigError: Pillow is not installed.
    """
    header = check_image(data, limits)
    try:
        with pillow().open(BytesIO(data), formats=(header.format,)) as image:
            if image.size != (header.width, header.height):
                raise InvalidImageError("the image's header contradicts itself")
            return upright_rgb(image)
    except (ConfigError, InvalidImageError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise InvalidImageError(
            f"the {header.format} cannot be decoded: it is damaged or truncated"
        ) from error


def upright_rgb(image: "Image") -> "Image":
    """A copy in RGB of what an open file shows, turned as EXIF says."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)  # a copy, with all data read
    if upright.mode.startswith("I"):  # a plain conversion would cut all above 255 off
        upright = upright.convert("I").point(lambda value: value * HIGH_BYTE).convert("L")
    if upright.mode == "P":  # its transparency may be a table, which RGB has no place for
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def pillow() -> ModuleType:
    """Pillow's `Image`. Raises `ConfigError` where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow, which the extra 'vision' brings: pip install 'octavo[vision]'"
        ) from error
    return Image
