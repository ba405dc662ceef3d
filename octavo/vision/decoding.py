"""From the bytes of a file to an RGB picture, within limits. Needs Pillow, the extra `vision`.

What the header promises is checked before anything is decoded, the decoder is chosen by us and not
by the file, and whatever it says of damaged data becomes one error that a client can be shown.
"""

from collections.abc import Sequence
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
    pillow = _pillow()
    header = check_image(data, limits)
    try:
        with pillow.open(BytesIO(data), formats=(header.format,)) as image:
            if image.size != (header.width, header.height):
                raise InvalidImageError("the image's header contradicts itself")
            return _upright_rgb(image)
    except InvalidImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise InvalidImageError(
            f"the {header.format} cannot be decoded: it is damaged or truncated"
        ) from error


def decode_video(frames: Sequence[bytes], limits: ImageLimits) -> "list[Image]":
    """The frames of a video, each an image file, all of one size.

    All headers are checked before the first frame is decoded.

    Raises:
        InvalidImageError: as `decode_image`, or the frames together are too many or too large, or
            not of one size.
        ConfigError: Pillow is not installed.
    """
    if not frames:
        raise InvalidImageError("the video has no frames")
    if len(frames) > limits.max_frames:
        raise InvalidImageError(
            f"the video has {len(frames)} frames; the limit is {limits.max_frames}: send fewer"
        )
    num_bytes = sum(map(len, frames))
    if num_bytes > limits.max_bytes:
        raise InvalidImageError(
            f"the video's frames have {num_bytes} bytes; the limit is {limits.max_bytes}"
        )
    headers = [check_image(frame, limits) for frame in frames]
    num_pixels = sum(header.width * header.height for header in headers)
    if num_pixels > limits.max_video_pixels:
        raise InvalidImageError(
            f"the video's frames have {num_pixels} pixels; the limit is {limits.max_video_pixels}: "
            "send fewer or smaller ones"
        )
    decoded = [decode_image(frame, limits) for frame in frames]
    if len({image.size for image in decoded}) > 1:
        raise InvalidImageError("the frames of a video must have one size")
    return decoded


def _upright_rgb(image: "Image") -> "Image":
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)  # a copy, with all data read
    if upright.mode.startswith("I"):  # a plain conversion would cut all above 255 off
        upright = upright.convert("I").point(lambda value: value * HIGH_BYTE).convert("L")
    if upright.mode == "P":  # its transparency may be a table, which RGB has no place for
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow, which the extra 'vision' brings: pip install 'octavo[vision]'"
        ) from error
    return Image
