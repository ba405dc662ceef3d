"""The weights of vision encoders, counted from their shapes. Knows no torch."""

from octavo.config.families.vision_shapes import (
    Blip2VisionConfig,
    LlavaVisionConfig,
    QFormerConfig,
    Qwen25VisionConfig,
    VisionConfig,
    ViTConfig,
)

# (rows, columns) of matrices, numbers in vectors and tables, and how often there is such a part.
Part = tuple[tuple[tuple[int, int], ...], int, int]


def encoder_parts(vision: VisionConfig) -> list[Part]:
    """What an encoder holds of its checkpoint."""
    if isinstance(vision, LlavaVisionConfig):
        return _llava_parts(vision)
    if isinstance(vision, Blip2VisionConfig):
        return _blip2_parts(vision)
    return _qwen_parts(vision)


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


def _blip2_parts(vision: Blip2VisionConfig) -> list[Part]:
    tower, qformer, out_size = vision.tower, vision.qformer, vision.out_hidden_size
    size, width = tower.hidden_size, qformer.hidden_size
    # A bias of patches, a class token, the positions of it and all patches, and the last norm.
    outer = size + size + (1 + tower.num_patches) * size + 2 * size
    num_crossing = -(-qformer.num_layers // qformer.cross_attention_every)
    plain, crossing = _qformer_layer(qformer), _crossing(qformer, size)
    return [
        (((size, 3 * tower.patch_size**2),), outer, 1),
        (*_vit_block(tower), tower.num_layers),
        (*plain, qformer.num_layers),
        (*crossing, num_crossing),
        (((out_size, width),), out_size + (qformer.num_queries + 2) * width, 1),
    ]


def _qformer_layer(qformer: QFormerConfig) -> tuple[tuple[tuple[int, int], ...], int]:
    """Without what looks at the image."""
    size, mlp = qformer.hidden_size, qformer.mlp
    matrices = (3 * size, size), (size, size), *mlp.matrices(size)
    return matrices, 4 * size + mlp.num_vector_values(size) + 4 * size  # biases, two layer norms


def _crossing(qformer: QFormerConfig, image_width: int) -> tuple[tuple[tuple[int, int], ...], int]:
    size = qformer.hidden_size
    matrices = (size, size), (2 * size, image_width), (size, size)
    return matrices, 4 * size + 2 * size  # biases and a layer norm


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
