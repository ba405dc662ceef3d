"""Videos: which frames are looked at, and how they come out of a file. Needs Pillow.

A file is an animation that Pillow reads (GIF, WebP, PNG) or, with PyAV, a film. Frames are brought
to the size that the model wants one by one, so that no more than these are ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from octavo.config.families.vision_shapes import PatchPixels, VideoSettings
from octavo.errors import ConfigError, InvalidImageError
from octavo.vision.decoding import decode_image, pillow, upright_rgb
from octavo.vision.films import decode_film, is_film
from octavo.vision.headers import ImageHeader, check_image
from octavo.vision.limits import ImageLimits
from octavo.vision.tokens import patch_grid

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FPS = 1000.0
DEFAULT_ANIMATION_FPS = 10.0  # what browsers make of frames without a duration


@dataclass(frozen=True, slots=True)
class Video:
    """Frames that are looked at, in order, all of one size.

    fps: how many of them make a second.
    """

    frames: "tuple[Image, ...]"
    fps: float


@dataclass(frozen=True, slots=True)
class VideoReader:
    """Gets frames of videos for one model.

    max_frames: of one video; a longer one is sampled more thinly.
    """

    settings: VideoSettings
    limits: ImageLimits
    max_frames: int

    def places(self, num_frames: int, fps: float, wanted_fps: float | None = None) -> list[int]:
        """Which frames of a video are looked at: evenly spread over all of it.

        As the `sample_frames` of transformers' Qwen2-VL processor has it: `wanted_fps` of a second,
        but no fewer than `min_frames` and no more than `max_frames`, and whole patches of them.
        """
        depth = self.settings.pixels.temporal_patch_size
        most = min(self.settings.max_frames, self.max_frames, num_frames)
        wanted = num_frames / fps * (wanted_fps or self.settings.fps)
        count = min(max(wanted, self.settings.min_frames), most // depth * depth)
        whole = int(count // depth) * depth or min(num_frames, most)
        return [i * num_frames // whole for i in range(whole)]

    def decode(self, data: bytes, fps: float | None = None) -> Video:
        """A video from the bytes of a file.

        Args:
            data: an animated GIF, WebP or PNG, or a film.
            fps: frames of a second that are wanted; by default the model's.

        Raises:
            InvalidImageError: not within the limits, in no known format, or damaged.
            ConfigError: Pillow is not installed.
        """
        if is_film(data):
            return self._film(data, fps)
        return self._animation(data, check_image(data, self.limits), fps)

    def decode_frames(self, files: Sequence[bytes], fps: float | None = None) -> Video:
        """A video from frames that somebody has chosen already, each an image file.

        All headers are checked before the first frame is decoded.

        Args:
            files: frames of one size.
            fps: how many of them make a second; by default as many as the model looks at.

        Raises:
            InvalidImageError: as `decode_image`, or the frames together are too many or too large,
                or not of one size.
            ConfigError: Pillow is not installed.
        """
        limits = self.limits
        self._check_number(len(files))
        if (num_bytes := sum(map(len, files))) > limits.max_bytes:
            raise InvalidImageError(
                f"the video's frames have {num_bytes} bytes; the limit is {limits.max_bytes}"
            )
        headers = [check_image(file, limits) for file in files]
        self._check_pixels(sum(header.width * header.height for header in headers))
        sizes, frames = set(), []
        for file in files:
            frame = decode_image(file, limits)
            sizes.add(frame.size)
            frames.append(self.fitted(frame))
        if len(sizes) > 1:
            raise InvalidImageError("the frames of a video must have one size")
        return Video(tuple(frames), fps or self.settings.fps)

    def of_pictures(self, frames: "Sequence[Image]", fps: float | None = None) -> Video:
        """A video of pictures of Pillow's. Raises as `decode_frames` does."""
        self._check_number(len(frames))
        if len({frame.size for frame in frames}) > 1:
            raise InvalidImageError("the frames of a video must have one size")
        fitted = tuple(self.fitted(frame.convert("RGB")) for frame in frames)
        return Video(fitted, fps or self.settings.fps)

    def fitted(self, frame: "Image") -> "Image":
        """The frame in the size that the encoder reads; one that has it stays what it is."""
        pixels = self.settings.pixels
        return frame.resize(fitted_size(pixels, frame.size), resample=pixels.resample)

    def _animation(self, data: bytes, header: ImageHeader, fps: float | None) -> Video:
        num_frames = header.num_frames
        self._check_pixels(num_frames * header.width * header.height)  # all of them are decoded
        own_fps = DEFAULT_ANIMATION_FPS
        if header.duration_ms:
            own_fps = min(MAX_FPS, num_frames / header.duration_ms * 1000)
        places = self.places(num_frames, own_fps, fps)
        chosen, frames = set(places), []
        try:
            with pillow().open(BytesIO(data), formats=(header.format,)) as image:
                if image.size != (header.width, header.height):
                    raise InvalidImageError("the video's header contradicts itself")
                for place in range(places[-1] + 1):
                    image.seek(place)
                    if place in chosen:
                        frames.append(self.fitted(upright_rgb(image)))
        except (ConfigError, InvalidImageError):
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise InvalidImageError(
                f"the {header.format} cannot be decoded: it is damaged or truncated"
            ) from error
        return Video(tuple(frames), len(places) / num_frames * own_fps)

    def _film(self, data: bytes, fps: float | None) -> Video:
        if len(data) > self.limits.max_bytes:
            raise InvalidImageError(
                f"the video has {len(data)} bytes; the limit is {self.limits.max_bytes}: cut it, "
                "or send some of its frames as images"
            )
        with decode_film(data, self.limits) as film:
            places = self.places(film.num_frames, film.fps, fps)
            width, height = fitted_size(self.settings.pixels, film.size)
            self._check_pixels(len(places) * width * height)
            frames = [self.fitted(frame) for frame in film.frames(places)]
        return Video(tuple(frames), len(places) / film.num_frames * film.fps)

    def _check_number(self, num_frames: int) -> None:
        if not num_frames:
            raise InvalidImageError("the video has no frames")
        most = min(self.limits.max_frames, self.settings.max_frames, self.max_frames)
        if num_frames > most:
            raise InvalidImageError(
                f"the video has {num_frames} frames; the limit is {most}: send fewer"
            )

    def _check_pixels(self, num_pixels: int) -> None:
        if num_pixels > self.limits.max_video_pixels:
            raise InvalidImageError(
                f"the video's frames have {num_pixels} pixels; the limit is "
                f"{self.limits.max_video_pixels}: send fewer or smaller ones"
            )


def fitted_size(pixels: PatchPixels, size: tuple[int, int]) -> tuple[int, int]:
    """Pillow's size (width, height) that a picture of such a size is resized to."""
    _, rows, columns = patch_grid(pixels, (size[1], size[0]))
    return columns * pixels.patch_size, rows * pixels.patch_size


def check_fps(fps: object) -> float | None:
    """What somebody gave as frames of a second; None where nothing is said.

    Raises:
        InvalidImageError: it is no such number.
    """
    if fps is None:
        return None
    if type(fps) not in (int, float) or not 0 < fps <= MAX_FPS:  # type: ignore[operator]
        raise InvalidImageError(f"fps must be a number above 0 and up to {MAX_FPS:g}")
    return float(fps)  # type: ignore[arg-type]
