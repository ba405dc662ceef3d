"""The shapes of vision encoders, in our own words: what each family's config is read into.

Knows no tensors, no pixels and no names of checkpoints' fields.
"""

from dataclasses import dataclass

from octavo.config.model import MLPConfig


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """A vision transformer (arXiv 2010.11929) over square images of one size.

    It puts a class token before the patches, adds a learned position to each, and has its norms
    before attention and MLP.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp: MLPConfig
    image_size: int  # pixels on a side
    patch_size: int
    norm_eps: float
    qkv_bias: bool = True

    @property
    def patches_per_side(self) -> int:
        """Whole patches; pixels beyond the last one are not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Of one image, without the class token."""
        return self.patches_per_side**2


@dataclass(frozen=True, slots=True)
class LlavaVisionConfig:
    """CLIP's tower and an MLP to the language model (arXiv 2304.08485, 2310.03744).

    With `tile_grids` images of any resolution become a small copy and tiles of full size (LLaVA-
    NeXT); without, one square.
    """

    tower: ViTConfig
    # Outputs of the tower that go side by side to the projector: 0 is what goes into its first
    # layer, n what comes out of its n-th.
    feature_layers: tuple[int, ...]
    keep_class_token: bool
    projector: MLPConfig
    out_hidden_size: int
    tile_grids: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels, whole tiles each


@dataclass(frozen=True, slots=True)
class QFormerConfig:
    """A Q-Former (arXiv 2301.12597, section 3.1): learned queries that read an image.

    Every `cross_attention_every`-th layer, the first one included, attends to the image.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp: MLPConfig
    norm_eps: float
    cross_attention_every: int
    num_queries: int


@dataclass(frozen=True, slots=True)
class Blip2VisionConfig:
    """A vision transformer, a Q-Former and a projection: BLIP-2, and MiniGPT-4 after it."""

    tower: ViTConfig
    qformer: QFormerConfig
    out_hidden_size: int


@dataclass(frozen=True, slots=True)
class Qwen25VisionConfig:
    """Qwen2.5-VL's tower (arXiv 2502.13923, section 2.1.1): any size of image, and videos.

    Patches are `temporal_patch_size` frames deep; `merge_size` by `merge_size` of them become one
    token. Attention stays within windows of `window_size` pixels, but for `full_layers`.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp: MLPConfig
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    full_layers: tuple[int, ...]
    rope_theta: float
    tokens_per_second: int  # temporal positions in a second of video
    out_hidden_size: int

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Numbers in a head."""
        return self.hidden_size // self.num_heads

    @property
    def window_units(self) -> int:
        """Merged tokens on a side of a window."""
        return self.window_size // self.patch_size // self.merge_size


VisionConfig = LlavaVisionConfig | Blip2VisionConfig | Qwen25VisionConfig


@dataclass(frozen=True, slots=True)
class PixelScale:
    """From bytes to the numbers of a tower: (byte * rescale - mean) / std, channel by channel."""

    rescale: float
    mean: tuple[float, ...]  # red, green, blue
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SquarePixels:
    """One square of `size` pixels a side, as CLIP and BLIP-2 want it.

    With `shortest_side` the image is resized so that its shorter side has so many pixels and
    the square is cut from its middle; without, it is squeezed into the square.
    """

    size: int
    shortest_side: int | None
    resample: int  # Pillow's number of the filter
    scale: PixelScale


@dataclass(frozen=True, slots=True)
class TiledPixels:
    """LLaVA-NeXT's: a small copy of the image, and tiles of the grid that fits it best."""

    tile_size: int
    grids: tuple[tuple[int, int], ...]  # (height, width) in pixels
    resample: int
    scale: PixelScale


@dataclass(frozen=True, slots=True)
class PatchPixels:
    """Qwen2-VL's: any size, rounded to whole merged tokens, between two numbers of pixels."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    resample: int
    scale: PixelScale


PixelSettings = SquarePixels | TiledPixels | PatchPixels


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """Which frames of a video are looked at, and how they are prepared."""

    pixels: PatchPixels
    fps: float  # frames of a second that are looked at
    min_frames: int  # so many of a short one, if it has them
    max_frames: int  # spread over all of a long one
