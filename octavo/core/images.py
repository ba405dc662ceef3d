"""Images and videos of a request, as the engine knows them: names, places, pixels. No Pillow."""

import hashlib

import msgspec
from msgspec import structs


class ImageInput(msgspec.Struct, frozen=True):
    """Where rows of an image or a video stand among a prompt's tokens."""

    key: str  # the name of its content: equal only where an encoder would answer the same
    start: int  # its first token's index in the prompt
    num_tokens: int
    grid: tuple[int, int, int] | None = None  # (frames, rows, columns), if positions follow them
    frame_step: float = 1.0  # positions in time from one of these frames to the next

    @property
    def end(self) -> int:
        """The index after its last token."""
        return self.start + self.num_tokens


class Picture(msgspec.Struct, frozen=True):
    """The pixels of an image or a video, decoded and not yet prepared for an encoder."""

    key: str
    width: int
    height: int
    rgb: bytes = b""  # rows from the top, three bytes a pixel; frame by frame
    num_frames: int | None = None  # of a video; None: an image


class SeenImages(msgspec.Struct, frozen=True):
    """The images of one prompt."""

    places: tuple[ImageInput, ...] = ()  # in the order of their places, without overlap
    pictures: tuple[Picture, ...] = ()  # each content once

    def salted(self, salt: str | None) -> "SeenImages":
        """The same under names that nobody else has: who has another salt finds none of them.

        Else the time of an answer would tell what others have shown before.
        """
        if salt is None or not self.places:
            return self
        return SeenImages(
            tuple(structs.replace(one, key=_salted(one.key, salt)) for one in self.places),
            tuple(structs.replace(one, key=_salted(one.key, salt)) for one in self.pictures),
        )


NO_IMAGES = SeenImages()


def _salted(key: str, salt: str) -> str:
    return hashlib.sha256(f"{key}/{salt}".encode()).hexdigest()
