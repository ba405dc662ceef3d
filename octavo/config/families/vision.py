"""Which architectures see, and who reads the vision part of their configs. Knows no tensors."""

from collections.abc import Callable, Mapping
from typing import Any

from octavo.config.families.vision_blip2 import read_blip2_vision
from octavo.config.families.vision_llava import read_llava_next_vision, read_llava_vision
from octavo.config.families.vision_qwen2_5_vl import read_qwen2_5_vl_vision
from octavo.config.families.vision_shapes import VisionConfig
from octavo.config.reading import short
from octavo.errors import UnsupportedModelError

# By transformers' class.
VISION_READERS: dict[str, Callable[[Mapping[str, Any]], VisionConfig]] = {
    "LlavaForConditionalGeneration": read_llava_vision,
    "LlavaNextForConditionalGeneration": read_llava_next_vision,
    "Blip2ForConditionalGeneration": read_blip2_vision,
    "Qwen2_5_VLForConditionalGeneration": read_qwen2_5_vl_vision,
}


def read_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """The vision part of a `config.json` in the style of transformers 4 or 5.

    Raises:
        UnsupportedModelError: an architecture or a value that is not supported, by its name.
        CheckpointError: a value that is missing, of the wrong type or absurd.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in VISION_READERS:
        raise UnsupportedModelError(
            f"images are not supported for the architecture {short(name)}; supported: "
            f"{', '.join(VISION_READERS)}"
        )
    return VISION_READERS[name](config)
