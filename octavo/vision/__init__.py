"""Images and videos: safe decoding, what the models want of their pixels, and encoders.

This surface needs neither torch nor numpy, so the front end may check and count with it; Pillow,
the extra `vision`, is imported when the first image is decoded, PyAV, the extra `video`, with the
first film. `octavo.vision.processing` makes numbers of pixels and needs numpy;
`octavo.vision.encoders` makes features of them and needs torch.
"""

from octavo.vision.content import content_key
from octavo.vision.decoding import decode_image
from octavo.vision.headers import ImageHeader, check_image
from octavo.vision.limits import ImageLimits
from octavo.vision.tokens import ImageSpan, Placeholder, expand_placeholders, num_image_tokens
from octavo.vision.videos import Video, VideoReader

__all__ = [
    "ImageHeader",
    "ImageLimits",
    "ImageSpan",
    "Placeholder",
    "Video",
    "VideoReader",
    "check_image",
    "content_key",
    "decode_image",
    "expand_placeholders",
    "num_image_tokens",
]
