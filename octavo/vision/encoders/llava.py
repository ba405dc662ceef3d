"""LLaVA 1.5 and LLaVA-NeXT (arXiv 2304.08485, 2310.03744): CLIP's tower, an MLP, tiles.

Only wiring and checkpoint names.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.config.families.vision_shapes import LlavaVisionConfig
from octavo.layers import Build, LayerNorm, Slot
from octavo.vision.encoders.attention import images_of
from octavo.vision.encoders.base import VisionEncoder, unused
from octavo.vision.encoders.projector import Projector
from octavo.vision.encoders.vit import PatchEmbedding, ViTBlock
from octavo.vision.geometry import unpadded
from octavo.vision.processing import EncoderInput

NAMES = {
    "patch": "patch_embedding",
    "class": "class_embedding",
    "positions": "position_embedding.weight",
}


class ClipTower(nn.Module):
    """CLIP's vision transformer (arXiv 2103.00020), up to the last layer that anybody asks for."""

    def __init__(self, config: LlavaVisionConfig, build: Build):
        super().__init__()
        tower, self._wanted = config.tower, config.feature_layers
        self._first = 0 if config.keep_class_token else 1
        self.embedding = PatchEmbedding(tower, build, bias=False)
        self.norm = LayerNorm(tower.hidden_size, tower.norm_eps, build)
        self._blocks = [ViTBlock(tower, build) for _ in range(max(self._wanted))]
        self.blocks = nn.ModuleList(self._blocks)
        self._tower = tower
        self._shapes_alone = replace(build, device="meta")

    def slots(self, name: str) -> dict[str, Slot]:
        """The table of checkpoint tensors."""
        table = self.embedding.slots(f"{name}.embeddings", NAMES)
        table |= self.norm.slots(f"{name}.pre_layrnorm")  # sic
        table |= unused(self.norm.slots(f"{name}.post_layernorm"))
        for index, block in enumerate(self._blocks):
            table |= _block_slots(block, f"{name}.encoder.layers.{index}")
        # The checkpoint has the rest, too.
        for index in range(len(self._blocks), self._tower.num_layers):
            absent = ViTBlock(self._tower, self._shapes_alone)
            table |= unused(_block_slots(absent, f"{name}.encoder.layers.{index}"))
        return table

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, side, side] -> [N, tokens, layers asked for * hidden_size]."""
        x: Tensor = self.norm(self.embedding(images).flatten(0, 1))[0]
        segments = images_of(len(images), len(x), x.device)
        residual: Tensor | None = None
        # Copies: the next layer writes over the stream.
        states = {0: x.clone()} if 0 in self._wanted else {}
        for index, block in enumerate(self._blocks, start=1):
            x, residual = block(x, residual, segments)
            if index in self._wanted:
                states[index] = x + residual
        features = torch.cat([states[index] for index in self._wanted], dim=-1)
        return features.view(len(images), -1, features.shape[-1])[:, self._first :]


def _block_slots(block: ViTBlock, name: str) -> dict[str, Slot]:
    qkv = {part: f"{name}.self_attn.{part}_proj" for part in ("q", "k", "v")}
    output = block.attention.output.slots({"o": f"{name}.self_attn.out_proj"})
    return block.slots(name) | block.attention.qkv.slots(qkv) | output


class LlavaEncoder(VisionEncoder):
    """The tower and its projector; with tiles, rows of patches with a newline at their ends."""

    def __init__(self, config: LlavaVisionConfig, build: Build):
        super().__init__(build)
        self._per_side = config.tower.patches_per_side
        self.tower = ClipTower(config, build)
        self.projector = Projector(
            config.projector,
            build,
            in_size=config.tower.hidden_size * len(config.feature_layers),
            out_size=config.out_hidden_size,
        )
        self.newline = (
            torch.empty(config.out_hidden_size, dtype=build.dtype, device=build.device)
            if config.tile_grids
            else None
        )

    def slots(self) -> dict[str, Slot]:
        """As VisionEncoder."""
        table = self.tower.slots("vision_tower")
        table |= self.projector.slots(*(f"multi_modal_projector.linear_{n}" for n in (1, 2)))
        if self.newline is not None:
            table["image_newline"] = Slot(tuple(self.newline.shape), self.newline.copy_)
        return table

    def forward(self, inputs: Sequence[EncoderInput]) -> list[Tensor]:
        """As VisionEncoder."""
        features = self.tower(self.values_of(inputs))
        projected = self.projector(features.flatten(0, 1)).view(*features.shape[:2], -1)
        images = projected.split([len(one.values) for one in inputs])
        if self.newline is None:
            return [image[0] for image in images]
        return [self._joined(*pair, self.newline) for pair in zip(images, inputs, strict=True)]

    def _joined(self, tiles: Tensor, image: EncoderInput, newline: Tensor) -> Tensor:
        """tiles [1 + tiles, patches, width] -> the small copy, then the picture row by row."""
        _, down, across = image.grid
        side = self._per_side
        picture = tiles[1:].view(down, across, side, side, -1).transpose(1, 2)
        picture = picture.reshape(down * side, across * side, -1)
        rows, columns = unpadded(image.size, (down * side, across * side))
        picture = picture[rows, columns]
        ends = newline.expand(len(picture), 1, -1)
        return torch.cat((tiles[0], torch.cat((picture, ends), dim=1).flatten(0, 1)))
