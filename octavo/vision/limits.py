"""How much an image or a video may ask for before anything of it is decoded."""

from dataclasses import dataclass

from octavo.errors import ConfigError

# Above this Pillow itself warns of a decompression bomb, and above twice as much it refuses.
MOST_PIXELS = 89_478_485


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of one image, or of the frames of one video together.

    Raises:
        ConfigError: a limit below 1, or more pixels than Pillow decodes.
    """

    max_bytes: int = 20 * 2**20  # as it came: of one file, or of all frames of a video
    max_pixels: int = 2**25  # of one image or frame: 96 MiB of RGB
    max_side: int = 2**14
    min_side: int = 2  # a picture of one pixel shows nothing
    max_frames: int = 768  # in one animated file, or in a list of frames
    max_film_pixels: int = 2**33  # of all frames of a film, most of which are not kept
    max_decoding_s: float = 30.0  # of a film
    max_video_pixels: int = 2**28  # of all frames of those together, and of what is kept of a video

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_side", "min_side", "max_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a limit is at least 1")
        if self.max_pixels > MOST_PIXELS:
            raise ConfigError(f"max_pixels={self.max_pixels} is above Pillow's {MOST_PIXELS}")
