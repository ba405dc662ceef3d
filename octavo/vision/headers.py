"""What an image file says of itself, read without decoding it: format, size, frames.

Knows PNG, JPEG, GIF and WebP, by their first bytes and not by what anybody calls them. Needs
neither Pillow nor numpy, so the front end can refuse a bomb before it goes any further.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.errors import InvalidImageError
from octavo.vision.limits import ImageLimits

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
# Every scan of a progressive JPEG goes over the whole picture, and an empty one is a few bytes
# long: real files have about ten.
MAX_JPEG_SCANS = 100
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # ISO 10918-1, table B.1
WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The size in pixels is that of the first frame as stored, before any turn by EXIF."""

    format: str  # one of FORMATS
    width: int
    height: int
    num_frames: int = 1  # counted no further than one above the limit
    duration_ms: int = 0  # of all frames that were counted; 0 where none says


def check_image(data: bytes, limits: ImageLimits) -> ImageHeader:
    """The header of an image within the limits.

    Raises:
        InvalidImageError: too many bytes, pixels or frames, no known format, or a damaged header.
    """
    if len(data) > limits.max_bytes:
        raise InvalidImageError(
            f"the image has {len(data)} bytes; the limit is {limits.max_bytes}: send a smaller one"
        )
    header = read_header(data, max_frames=limits.max_frames)
    width, height = header.width, header.height
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise InvalidImageError(
            f"the image has {width}x{height} pixels; the limit is {limits.max_side} on a side and "
            f"{limits.max_pixels} in all: scale it down"
        )
    if min(width, height) < limits.min_side:
        raise InvalidImageError(
            f"the image has {width}x{height} pixels; a side has at least {limits.min_side}"
        )
    if header.num_frames > limits.max_frames:
        raise InvalidImageError(
            f"the image has more than {limits.max_frames} frames: send the one that you mean"
        )
    return header


def read_header(data: bytes, *, max_frames: int) -> ImageHeader:
    """The header of an image of any size.

    Raises:
        InvalidImageError: no known format, or a damaged header.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data, max_frames)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif(data, max_frames)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data, max_frames)
    except (struct.error, IndexError) as error:
        raise InvalidImageError("the image is truncated: its header ends early") from error
    raise InvalidImageError(f"the image is in no known format; supported: {', '.join(FORMATS)}")


def _png(data: bytes, max_frames: int) -> ImageHeader:
    """PNG, third edition, 11.2.1 (IHDR), 11.3.6 (acTL, before the first IDAT; fcTL)."""
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise InvalidImageError("the PNG does not begin with a header")
    num_frames, num_told, duration_ms = 1, 0, 0.0
    for kind, place in _png_chunks(data):
        if kind == b"acTL":
            (num_frames,) = struct.unpack_from(">I", data, place)
        elif kind == b"IDAT" and num_frames == 1:
            break
        elif kind == b"fcTL" and num_told < min(num_frames, max_frames):
            numerator, denominator = struct.unpack_from(">HH", data, place + 20)
            duration_ms += 1000 * numerator / (denominator or 100)
            num_told += 1
    return ImageHeader("PNG", width, height, num_frames, round(duration_ms))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, where its data begins) of each chunk."""
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, place + 8
        place += 12 + length


def _jpeg(data: bytes) -> ImageHeader:
    """ISO 10918-1, B.1.1.2 (markers) and B.2.2 (frame header)."""
    # Entropy-coded data never has this pair; other segments may by chance.
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise InvalidImageError(f"the JPEG has more than {MAX_JPEG_SCANS} scans: save it anew")
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
        elif marker in WITHOUT_LENGTH:
            place += 2
        elif marker in START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return ImageHeader("JPEG", width, height)
        else:
            (length,) = struct.unpack_from(">H", data, place + 2)
            place += 2 + length
    raise InvalidImageError("the JPEG has no frame header")


def _gif(data: bytes, max_frames: int) -> ImageHeader:
    """GIF89a, sections 18 (screen), 20 (image descriptor), 15 (blocks) and 23 (delays)."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + _color_table_bytes(flags)
    num_frames = duration_ms = 0
    while place < len(data) and num_frames <= max_frames:
        introducer = data[place]
        if introducer == 0x2C:
            left, top, frame_width, frame_height, flags = struct.unpack_from(
                "<HHHHB", data, place + 1
            )
            if not num_frames:  # decoders widen the screen for a frame that is larger
                width, height = max(width, left + frame_width), max(height, top + frame_height)
            num_frames += 1
            place = _after_blocks(data, place + 11 + _color_table_bytes(flags))
        elif introducer == 0x21:
            if data[place + 1] == 0xF9:
                duration_ms += 10 * struct.unpack_from("<H", data, place + 4)[0]
            place = _after_blocks(data, place + 2)
        else:
            break
    if not num_frames:
        raise InvalidImageError("the GIF has no picture")
    return ImageHeader("GIF", width, height, num_frames, duration_ms)


def _color_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, place: int) -> int:
    """Where the data sub-blocks end that begin here; the end of a truncated file counts."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1


def _webp(data: bytes, max_frames: int) -> ImageHeader:
    """RFC 9649, sections 2.5 to 2.7."""
    size: tuple[int, int] | None = None
    num_frames = duration_ms = 0
    for kind, place in _riff_chunks(data):
        if kind == b"VP8X":
            size = _uint24(data, place + 4) + 1, _uint24(data, place + 7) + 1
        elif kind == b"ANMF":
            num_frames += 1
            duration_ms += _uint24(data, place + 12)
            if num_frames > max_frames:
                break
        elif kind == b"VP8 " and size is None:
            if data[place + 3 : place + 6] != b"\x9d\x01\x2a":  # RFC 6386, 9.1
                raise InvalidImageError("the WebP's picture has no header")
            width, height = struct.unpack_from("<HH", data, place + 6)
            size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", data, place + 1)
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if size is None:
        raise InvalidImageError("the WebP has no picture")
    return ImageHeader("WEBP", *size, max(num_frames, 1), duration_ms)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, where its data begins) of each chunk."""
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        yield kind, place + 8
        place += 8 + length + length % 2


def _uint24(data: bytes, place: int) -> int:
    low, high = struct.unpack_from("<HB", data, place)
    return int(low | high << 16)
