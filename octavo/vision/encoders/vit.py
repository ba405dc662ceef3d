"""The vision transformer (arXiv 2010.11929): what CLIP's tower and the EVA tower share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.config.families.vision_shapes import ViTConfig
from octavo.kernels import Segments
from octavo.layers import Build, LayerNorm, Linear, PlainMLP, Slot
from octavo.vision.encoders.attention import SelfAttention


class ViTBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, config: ViTConfig, build: Build):
        super().__init__()
        size = config.hidden_size
        self.attention_norm = LayerNorm(size, config.norm_eps, build)
        self.attention = SelfAttention(size, config.num_heads, build, bias=config.qkv_bias)
        self.mlp_norm = LayerNorm(size, config.norm_eps, build)
        self.mlp = PlainMLP(config.mlp, size, build)

    def slots(self, name: str) -> dict[str, Slot]:
        """All but those of the attention, whose names differ."""
        return (
            self.attention_norm.slots(f"{name}.layer_norm1")
            | self.mlp_norm.slots(f"{name}.layer_norm2")
            | self.mlp.slots(f"{name}.mlp", "fc1", "fc2")
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, images: Segments
    ) -> tuple[Tensor, Tensor]:
        """x and the residual stream, [images * tokens, hidden_size] -> what is added to it, it."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.mlp_norm(self.attention(x, images), residual)
        return self.mlp(x), residual


class PatchEmbedding(nn.Module):
    """Squares of pixels to vectors, a class token before them, a learned position for each."""

    def __init__(self, config: ViTConfig, build: Build, *, bias: bool):
        super().__init__()
        self._side, self._per_side = config.patch_size, config.patches_per_side
        size = config.hidden_size
        self._kernel = size, 3, self._side, self._side
        self.patches = Linear({"patch": size}, 3 * self._side**2, build, bias=bias)
        self.class_token = torch.empty(size, dtype=build.dtype, device=build.device)
        self.positions = torch.empty(
            1 + config.num_patches, size, dtype=build.dtype, device=build.device
        )

    def slots(self, name: str, names: Mapping[str, str], *, nested: int = 0) -> dict[str, Slot]:
        """The table of checkpoint tensors.

        Args:
            name: the checkpoint's name of the embeddings.
            names: its names of "patch", "class" and "positions" below it.
            nested: dimensions of size 1 before those of the class token and the positions.
        """
        table = patch_slots(self.patches, f"{name}.{names['patch']}", self._kernel)
        for part, place in (("class", self.class_token), ("positions", self.positions)):
            ones = (1,) * (nested + (part == "class") * nested)
            table[f"{name}.{names[part]}"] = _reshaped(place, (*ones, *place.shape))
        return table

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, side, side] -> [N, 1 + patches, hidden_size]."""
        per_side, side = self._per_side, self._side
        whole = images[..., : per_side * side, : per_side * side]
        patches = whole.reshape(len(images), 3, per_side, side, per_side, side)
        rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * side * side)
        x = self.patches(rows).view(len(images), -1, len(self.class_token))
        first = self.class_token.expand(len(images), 1, -1)
        return torch.cat((first, x), dim=1) + self.positions


def patch_slots(patches: Linear, name: str, kernel: tuple[int, ...]) -> dict[str, Slot]:
    """The table of a convolution whose stride is its kernel [out, ...]: a product over patches."""
    table = patches.slots({"patch": name})
    plain = table[f"{name}.weight"]
    table[f"{name}.weight"] = Slot(kernel, lambda tensor: plain.load(tensor.flatten(1)))
    return table


def _reshaped(place: Tensor, shape: tuple[int, ...]) -> Slot:
    return Slot(shape, lambda tensor: place.copy_(tensor.view(place.shape)))
