"""The weights of vision encoders, counted from their shapes. Knows no torch."""

from octavo.config.families.vision_shapes import (
    LlavaVisionConfig,
    Qwen25VisionConfig,
    VisionConfig,
    ViTConfig,
)
from octavo.errors import IntegrityError

# (rows, columns) of matrices, numbers in vectors and tables, and how often there is such a part.
Part = tuple[tuple[tuple[int, int], ...], int, int]


def encoder_parts(vision: VisionConfig) -> list[Part]:
    """What an encoder holds of its checkpoint."""
    if isinstance(vision, LlavaVisionConfig):
        return _llava_parts(vision)
    if isinstance(vision, Qwen25VisionConfig):
        return _qwen_parts(vision)
    raise IntegrityError(f"nobody counted the weights of {type(vision).__name__}")


def _llava_parts(vision: LlavaVisionConfig) -> list[Part]:
    tower, projector, out_size = vision.tower, vision.projector, vision.out_hidden_size
    size = tower.hidden_size
    # A class token, the positions of it and all patches, and a norm before the first block.
    outer = size + (1 + tower.num_patches) * size + 2 * size
    newline = out_size * bool(vision.tile_grids)
    inner = projector.intermediate_size
    products = (inner, size * len(vision.feature_layers)), (out_size, inner)
    return [
        (((size, 3 * tower.patch_size**2),), outer, 1),
        (*_vit_block(tower), max(vision.feature_layers)),  # what lies behind is not held
        (products, (inner + out_size) * projector.bias + newline, 1),
    ]


def _qwen_parts(vision: Qwen25VisionConfig) -> list[Part]:
    size, mlp, out_size = vision.hidden_size, vision.mlp, vision.out_hidden_size
    unit = size * vision.merge_size**2
    matrices = (3 * size, size), (size, size), *mlp.matrices(size)
    vectors = 4 * size + mlp.num_vector_values(size) + 2 * size  # biases, and two RMS norms
    return [
        (((size, vision.patch_values),), size, 1),  # and the norm after the last block
        (matrices, vectors, vision.num_layers),
        (((unit, unit), (out_size, unit)), unit + out_size, 1),
    ]


def _vit_block(tower: ViTConfig) -> tuple[tuple[tuple[int, int], ...], int]:
    size = tower.hidden_size
    matrices = (3 * size, size), (size, size), *tower.mlp.matrices(size)
    biases = 3 * size * tower.qkv_bias + size + tower.mlp.num_vector_values(size)
    return matrices, biases + 4 * size  # two layer norms
