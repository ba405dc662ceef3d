"""Films: MP4, WebM and Matroska, frame by frame, through PyAV. Needs the extra `video`.

The demuxer is chosen by us and not by the file, decoders are those of a list, and nothing is
decoded before the size and the number of frames are known to be within limits. Pictures are as
stored: neither turned nor stretched as the container may say.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidImageError, OctavoError
from octavo.vision.limits import ImageLimits

if TYPE_CHECKING:
    from PIL.Image import Image

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4")
# In its packets are frames for others to be made of (RFC 6386, 9.1); other codecs hide them.
VP8, SHOW_FRAME = ("vp8", "libvpx"), 1 << 4
DAMAGED = "the video cannot be decoded: it is damaged or truncated"


@dataclass(frozen=True, slots=True)
class Film:
    """An open film. size: (width, height) in pixels."""

    num_frames: int
    fps: float
    size: tuple[int, int]
    _container: Any
    _limits: ImageLimits

    def frames(self, places: Sequence[int]) -> "Iterator[Image]":
        """The frames at these ascending places, each once it is decoded.

        Raises:
            InvalidImageError: the film is damaged, changes its size, has fewer frames than packets,
                or takes longer than `max_decoding_s`.
        """
        wanted, deadline_s = iter(places), time.monotonic() + self._limits.max_decoding_s
        place = next(wanted)
        for index, frame in enumerate(self._container.decode(video=0)):
            if time.monotonic() > deadline_s:
                raise InvalidImageError(
                    f"the video is not decoded within {self._limits.max_decoding_s:g} s: send a "
                    "shorter or smaller one, or some of its frames as images"
                )
            if frame.is_corrupt:
                raise InvalidImageError(DAMAGED)
            if (frame.width, frame.height) != self.size:
                raise InvalidImageError("the frames of a video must have one size")
            if index == place:
                yield frame.to_image()
                following = next(wanted, None)
                if following is None:
                    return
                place = following
        raise InvalidImageError(DAMAGED)


def is_film(data: bytes) -> bool:
    """Whether the first bytes are those of a container that is known here."""
    return _demuxer(data) is not None


@contextmanager
def decode_film(data: bytes, limits: ImageLimits) -> Iterator[Film]:
    """An open film of known size and length; nothing of it is decoded yet.

    Raises:
        InvalidImageError: no video in it, another codec, damage, more than the limits allow, or
            PyAV is not installed.
    """
    av = _pyav()
    try:
        num_packets = _num_packets(av, data)
        with av.open(BytesIO(data), format=_demuxer(data)) as container:
            yield _checked(container, num_packets, limits)
    except OctavoError:
        raise
    except Exception as error:  # of damaged files FFmpeg's errors are of many kinds
        raise InvalidImageError(DAMAGED) from error


def _checked(container: Any, num_packets: int, limits: ImageLimits) -> Film:
    [stream, *_] = container.streams.video
    context = stream.codec_context
    if context.name not in CODECS and context.codec.canonical_name not in CODECS:
        raise InvalidImageError(
            f"the video is coded as {context.name[:20]}; supported: {', '.join(CODECS)}"
        )
    width, height, fps = context.width, context.height, float(stream.average_rate or 0)
    if not (width and height and num_packets and fps > 0) or num_packets < stream.frames:
        raise InvalidImageError(DAMAGED)
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise InvalidImageError(
            f"the video has {width}x{height} pixels; the limit is {limits.max_side} on a side and "
            f"{limits.max_pixels} in all: scale it down"
        )
    if num_packets * width * height > limits.max_film_pixels:
        raise InvalidImageError(
            f"the video has {num_packets} frames of {width}x{height} pixels; the limit is "
            f"{limits.max_film_pixels} pixels in all frames: send a shorter or smaller one"
        )
    # Of frames that say later that they are larger than the header said.
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count = 1
    return Film(num_packets, fps, (width, height), container, limits)


def _num_packets(av: ModuleType, data: bytes) -> int:
    """Frames by the packets that there are: headers need not say how many, nor the truth."""
    with av.open(BytesIO(data), format=_demuxer(data)) as container:
        if not container.streams.video:
            raise InvalidImageError("the file has no video in it")
        is_vp8 = container.streams.video[0].codec_context.name in VP8
        num_packets = 0
        for packet in container.demux(video=0):
            if packet.is_corrupt:
                raise InvalidImageError(DAMAGED)
            is_hidden = is_vp8 and packet.size and not bytes(packet)[0] & SHOW_FRAME
            num_packets += bool(packet.size) and not is_hidden
        return num_packets


def _demuxer(data: bytes) -> str | None:
    """FFmpeg's name of the container: ISO/IEC 14496-12, 4.3 (ftyp); RFC 8794, 11.2.1 (EBML)."""
    if data[4:8] == b"ftyp":
        return "mp4"
    return "matroska" if data.startswith(b"\x1a\x45\xdf\xa3") else None


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InvalidImageError(
            "films are not read here: send an animated GIF, WebP or PNG, or frames as "
            "data:video/jpeg;base64,<frame>,<frame>; or have PyAV installed, which the extra "
            "'video' brings: pip install 'octavo[video]'"
        ) from error
    return av
