"""Prompts with images and videos: from pictures and token ids to what the engine takes.

Runs where requests come in, and needs neither torch nor numpy. Pictures are decoded already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from msgspec import structs

from octavo.config import Checkpoint, ModelConfig, read_model_config
from octavo.config.families.vision_shapes import Blip2VisionConfig, PixelSettings, VisionConfig
from octavo.core import ImageInput, Picture, SeenImages
from octavo.errors import InvalidImageError
from octavo.vision.content import PLAIN_MODES, content_key
from octavo.vision.decoding import decode_image
from octavo.vision.limits import ImageLimits
from octavo.vision.tokens import (
    Placeholder,
    expand_placeholders,
    frame_step_of,
    num_image_tokens,
    token_grid,
)
from octavo.vision.videos import Video, VideoReader

if TYPE_CHECKING:
    from PIL.Image import Image

# As the chat templates of processors know them.
IMAGE_PART, VIDEO_PART = {"type": "image"}, {"type": "video"}
MAX_VIDEO_FRAMES = 64  # 32 of Qwen2.5-VL's tokens of time


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Counts, names and places images and videos for one model.

    videos: None where it takes none, and so is the id of their placeholder.
    """

    vision: VisionConfig
    pixels: PixelSettings
    image_token_id: int
    limits: ImageLimits = ImageLimits()
    videos: VideoReader | None = None
    video_token_id: int | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        limits: ImageLimits | None = None,
        *,
        max_video_frames: int = MAX_VIDEO_FRAMES,
    ) -> "ImageReader | None":
        """The reader for a model; None where it sees nothing."""
        if config.vision is None or config.pixels is None or config.image_token_id is None:
            return None
        limits = limits or ImageLimits()
        videos = None
        if config.videos is not None:
            videos = VideoReader(config.videos, limits, max_video_frames)
        token_ids = config.image_token_id, config.video_token_id
        return cls(config.vision, config.pixels, token_ids[0], limits, videos, token_ids[1])

    def decode(self, data: bytes) -> "Image":
        """A picture from the bytes of a file. Raises as `decode_image` does."""
        return decode_image(data, self.limits)

    def decode_video(self, data: bytes | list[bytes], fps: float | None = None) -> Video:
        """A video from the bytes of a file, or of its frames. Raises as `VideoReader` does."""
        videos = self.video_reader()
        if isinstance(data, bytes):
            return videos.decode(data, fps)
        return videos.decode_frames(data, fps)

    def video_reader(self) -> VideoReader:
        """What reads videos.

        Raises:
            InvalidImageError: the model takes none.
        """
        if self.videos is None:
            raise InvalidImageError(
                "this model takes images, not videos: send some of the frames as images"
            )
        return self.videos

    def lay_out(
        self, token_ids: Sequence[int], images: Sequence["Image"], videos: Sequence[Video] = ()
    ) -> tuple[list[int], SeenImages]:
        """(the prompt with as many placeholders as images have tokens, the images in it)

        Args:
            token_ids: with one placeholder for each image and each video. BLIP-2's images may do
                without: they come before all else, as its processor puts them.
            images: pictures of Pillow's.
            videos: of `video_reader`'s.

        Raises:
            InvalidImageError: not as many placeholders as images, an image that is too large or
                too small, or one of a shape that the model does not take.
        """
        if isinstance(self.vision, Blip2VisionConfig) and self.image_token_id not in token_ids:
            token_ids = [self.image_token_id] * len(images) + list(token_ids)
        seen = [self._image(image) for image in images]
        filmed = [self._video(video) for video in videos]
        kinds = [("images", self.image_token_id, seen)]
        if self.video_token_id is not None:
            kinds.append(("videos", self.video_token_id, filmed))
        expanded, spans = expand_placeholders(
            token_ids,
            [
                Placeholder(name, token_id, [place.num_tokens for place, _ in one])
                for name, token_id, one in kinds
            ],
        )
        places = [
            structs.replace(place, start=span.start)
            for (place, _), span in zip(seen + filmed, chain(*spans), strict=True)
        ]
        places.sort(key=lambda place: place.start)
        pictures = {picture.key: picture for _, picture in seen + filmed}
        return expanded, SeenImages(tuple(places), tuple(pictures.values()))

    def _image(self, image: "Image") -> tuple[ImageInput, Picture]:
        """(its place but for where that begins, its pixels)"""
        self._check_size(*image.size)
        size = image.height, image.width
        rgb = image if image.mode in PLAIN_MODES[:1] else image.convert("RGB")
        key = content_key([rgb], self.pixels)
        num_tokens = num_image_tokens(self.vision, self.pixels, size)
        place = ImageInput(key, 0, num_tokens, token_grid(self.pixels, size))
        return place, Picture(key, image.width, image.height, rgb.tobytes())

    def _video(self, video: Video) -> tuple[ImageInput, Picture]:
        """As `_image`."""
        pixels = self.video_reader().settings.pixels
        width, height = video.frames[0].size
        self._check_size(width, height)
        size, count = (height, width), len(video.frames)
        frame_step = frame_step_of(self.vision, video.fps)
        key = content_key(video.frames, pixels, frame_step=frame_step)
        num_tokens = num_image_tokens(self.vision, pixels, size, num_frames=count)
        grid = token_grid(pixels, size, num_frames=count)
        place = ImageInput(key, 0, num_tokens, grid, frame_step)
        rgb = b"".join(frame.tobytes() for frame in video.frames)
        return place, Picture(key, width, height, rgb, count)

    def _check_size(self, width: int, height: int) -> None:
        limits = self.limits
        if width * height > limits.max_pixels or not (
            limits.min_side <= min(width, height) <= max(width, height) <= limits.max_side
        ):
            raise InvalidImageError(
                f"an image of {width} x {height} pixels is not within the limits: sides of "
                f"{limits.min_side} to {limits.max_side}, and {limits.max_pixels} pixels in all"
            )


def shown_in(data: Mapping[str, Any], reader: ImageReader) -> "tuple[list[Image], list[Video]]":
    """The pictures and videos of a prompt's `multi_modal_data`.

    Args:
        data: {"image": one or a list of Pillow's pictures, "video": one or a list of videos}; a
            video is a list of pictures, `reader.videos.settings.fps` of them a second, or a
            `Video`, which says how many.
        reader: that of the model.

    Raises:
        InvalidImageError: other kinds of data, or what is no picture and no video.
    """
    if unknown := sorted(map(str, data.keys() - {"image", "video"})):
        message = f"multi_modal_data takes 'image' and 'video', not {', '.join(unknown)}"
        raise InvalidImageError(message)
    given = data.get("image", ())
    images = list(given) if isinstance(given, (list, tuple)) else [given]
    for image in images:
        check_picture(image)
    videos = data.get("video", ())
    are_many = isinstance(videos, (list, tuple)) and all(
        isinstance(one, (list, tuple, Video)) for one in videos
    )
    return images, [video_of(one, reader) for one in (videos if are_many else [videos])]


def video_of(given: object, reader: ImageReader, fps: float | None = None) -> Video:
    """A video of a `Video` or a list of Pillow's pictures. Raises as `shown_in` does."""
    videos = reader.video_reader()
    if isinstance(given, Video):
        fps = given.fps
        given = given.frames
    if not isinstance(given, (list, tuple)):
        raise InvalidImageError(
            f"a video must be a list of PIL.Image.Image or an octavo.vision.Video, not "
            f"{type(given).__name__}"
        )
    for frame in given:
        check_picture(frame)
    return videos.of_pictures(given, fps)


def check_picture(image: object) -> None:
    """Refuse what is no picture of Pillow's."""
    from PIL.Image import Image  # the extra `vision`; whoever has a picture has it

    if not isinstance(image, Image):
        raise InvalidImageError(
            f"an image must be a PIL.Image.Image, not {type(image).__name__}: open files with "
            "PIL.Image.open"
        )


def load_image_reader(
    checkpoint: Checkpoint,
    *,
    model_impl: str = "auto",
    limits: ImageLimits | None = None,
    max_video_frames: int = MAX_VIDEO_FRAMES,
) -> ImageReader | None:
    """The reader for a located checkpoint. Raises as `read_model_config` does."""
    if "vision_config" not in checkpoint.config():
        return None  # whatever else it is: who only generates text need not read on
    config = read_model_config(checkpoint, model_impl)
    return ImageReader.of(config, limits, max_video_frames=max_video_frames)
