"""Vision encoders, one architecture a file: from prepared pictures to rows of the model's width."""

from octavo.config.families.vision_shapes import (
    Blip2VisionConfig,
    LlavaVisionConfig,
    VisionConfig,
)
from octavo.layers import Build
from octavo.vision.encoders.base import VisionEncoder
from octavo.vision.encoders.blip2 import Blip2Encoder
from octavo.vision.encoders.llava import LlavaEncoder
from octavo.vision.encoders.names import current_name
from octavo.vision.encoders.qwen2_5_vl import Qwen25VisionEncoder


def create_encoder(config: VisionConfig, build: Build) -> VisionEncoder:
    """An empty encoder whose slots wait for weights."""
    match config:
        case LlavaVisionConfig():
            return LlavaEncoder(config, build)
        case Blip2VisionConfig():
            return Blip2Encoder(config, build)
        case _:
            return Qwen25VisionEncoder(config, build)


__all__ = ["VisionEncoder", "create_encoder", "current_name"]
