"""Prompts with images: from pictures and token ids to what the engine takes.

Runs where requests come in, and needs neither torch nor numpy. Pictures are decoded already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.config import Checkpoint, ModelConfig, read_model_config
from octavo.config.families.vision_shapes import PixelSettings, VisionConfig
from octavo.core import ImageInput, Picture, SeenImages
from octavo.errors import InvalidImageError
from octavo.vision.content import PLAIN_MODES, content_key
from octavo.vision.decoding import decode_image
from octavo.vision.limits import ImageLimits
from octavo.vision.tokens import expand_placeholders, num_image_tokens, token_grid

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PART = {"type": "image"}  # as the chat templates of image processors know it


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Counts, names and places images for one model."""

    vision: VisionConfig
    pixels: PixelSettings
    image_token_id: int
    limits: ImageLimits = ImageLimits()

    @classmethod
    def of(cls, config: ModelConfig, limits: ImageLimits | None = None) -> "ImageReader | None":
        """The reader for a model; None where it sees no images."""
        if config.vision is None or config.pixels is None or config.image_token_id is None:
            return None
        return cls(config.vision, config.pixels, config.image_token_id, limits or ImageLimits())

    def decode(self, data: bytes) -> "Image":
        """A picture from the bytes of a file. Raises as `decode_image` does."""
        return decode_image(data, self.limits)

    def lay_out(
        self, token_ids: Sequence[int], images: Sequence["Image"]
    ) -> tuple[list[int], SeenImages]:
        """(the prompt with as many placeholders as images have tokens, the images in it)

        Args:
            token_ids: with one placeholder for each image.
            images: pictures of Pillow's.

        Raises:
            InvalidImageError: not as many placeholders as images, an image that is too large or
                too small, or one of a shape that the model does not take.
        """
        pictures = [self._picture(image) for image in images]
        sizes = [(picture.height, picture.width) for picture in pictures]
        counts = [num_image_tokens(self.vision, self.pixels, size) for size in sizes]
        expanded, spans = expand_placeholders(token_ids, self.image_token_id, counts)
        places = tuple(
            ImageInput(picture.key, span.start, span.num_tokens, token_grid(self.pixels, size))
            for picture, span, size in zip(pictures, spans, sizes, strict=True)
        )
        by_key = {picture.key: picture for picture in pictures}
        return expanded, SeenImages(places, tuple(by_key.values()))

    def _picture(self, image: "Image") -> Picture:
        limits, (width, height) = self.limits, image.size
        if width * height > limits.max_pixels or not (
            limits.min_side <= min(width, height) <= max(width, height) <= limits.max_side
        ):
            raise InvalidImageError(
                f"an image of {width} x {height} pixels is not within the limits: sides of "
                f"{limits.min_side} to {limits.max_side}, and {limits.max_pixels} pixels in all"
            )
        rgb = image if image.mode in PLAIN_MODES[:1] else image.convert("RGB")
        return Picture(content_key([rgb], self.pixels), width, height, rgb.tobytes())


def images_of(data: Mapping[str, Any]) -> list["Image"]:
    """The pictures of a prompt's `multi_modal_data`: {"image": one or a list of Pillow's}.

    Raises:
        InvalidImageError: other kinds of data, or what is no picture.
    """
    unknown = sorted(map(str, data.keys() - {"image"}))
    if unknown:
        raise InvalidImageError(f"multi_modal_data takes 'image' only, not {', '.join(unknown)}")
    given = data.get("image", ())
    images = given if isinstance(given, (list, tuple)) else [given]
    for image in images:
        check_picture(image)
    return list(images)


def check_picture(image: object) -> None:
    """Refuse what is no picture of Pillow's."""
    from PIL.Image import Image  # the extra `vision`; whoever has a picture has it

    if not isinstance(image, Image):
        raise InvalidImageError(
            f"an image must be a PIL.Image.Image, not {type(image).__name__}: open files with "
            "PIL.Image.open"
        )


def load_image_reader(
    checkpoint: Checkpoint, *, model_impl: str = "auto", limits: ImageLimits | None = None
) -> ImageReader | None:
    """The reader for a located checkpoint. Raises as `read_model_config` does."""
    if "vision_config" not in checkpoint.config():
        return None  # whatever else it is: who only generates text need not read on
    return ImageReader.of(read_model_config(checkpoint, model_impl), limits)
