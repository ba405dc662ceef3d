"""Multi-head latent attention (arXiv 2405.04434, section 2.1), over a cache of latents only.

The projections from a latent to each head's key and value are absorbed: a query is taken to where
the latents are, and what they add up to is taken out of there. A checkpoint's pairs of numbers that
turn together stand side by side; rows of weights are put in our order when they are loaded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.config import LatentAttentionConfig
from octavo.errors import ConfigError
from octavo.kernels import LATENT_ATTENTION, LATENT_KV_WRITE, Choice
from octavo.layers.attention import KVSpec
from octavo.layers.build import Build, Layer
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotary
from octavo.layers.slot import Slot

NORM_EPS = 1e-6  # of the latent's norm, whatever the model's: DeepSeek's constant


class LatentAttention(Layer):
    """Projections, the write of this step's latents to layer `layer`'s cache, and attention."""

    def __init__(
        self,
        config: LatentAttentionConfig,
        layer: int,
        hidden_size: int,
        build: Build,
        *,
        rotary: Rotary,
    ):
        super().__init__()
        if build.batch_invariant:
            raise ConfigError(
                "multi-head latent attention takes products that are not batch-invariant: run this "
                "model with determinism seeded"
            )
        self._config, self._layer, self._cos_sin = config, layer, rotary.cos_sin
        self._heads = build.group.share(config.num_heads, "attention heads")
        num_heads, rank = self._heads.stop - self._heads.start, config.kv_lora_rank
        self.query = Linear({"q": config.num_projected_values}, hidden_size, build, split="rows")
        self.latent = Linear({"kv": config.head_dim}, hidden_size, build, bias=config.bias)
        self.norm = RMSNorm(rank, NORM_EPS, build)
        self.output = Linear(
            {"o": hidden_size},
            config.num_heads * config.value_head_dim,
            build,
            bias=config.output_bias,
            split="columns",
        )
        like = torch.empty(0, dtype=build.dtype, device=build.device)
        self.into_latent = like.new_empty(num_heads, config.nope_head_dim, rank)
        self.out_of_latent = like.new_empty(num_heads, rank, config.value_head_dim)
        sizes = {"num_heads": num_heads, "kv_lora_rank": rank, "head_dim": config.head_dim}
        case = build.case(sizes | {"block_size": build.block_size})
        self._choices = LATENT_KV_WRITE.select(case), LATENT_ATTENTION.select(case)
        self._write = self._choices[0].function
        self._attend = self._choices[1].function
        self.spec = KVSpec(1, config.head_dim, num_parts=1)

    def slots(self, names: Mapping[str, str]) -> dict[str, Slot]:
        """The table of checkpoint tensors, given its names.

        They are those of the projections to queries ("query") and to the latent and the rotated key
        ("latent"), of the latent's norm ("norm"), of the projection from it to all heads' keys and
        values ("heads"), and of the "output".
        """
        config = self._config
        heads = config.nope_head_dim + config.value_head_dim
        table = self._reordered(self.query.slots({"q": names["query"]}), config.num_heads)
        table |= self._reordered(self.latent.slots({"kv": names["latent"]}), 1)
        table |= self.norm.slots(names["norm"]) | self.output.slots({"o": names["output"]})
        shape = config.num_heads * heads, config.kv_lora_rank
        return table | {f"{names['heads']}.weight": Slot(shape, self._load_heads)}

    def _reordered(self, table: dict[str, Slot], num_heads: int) -> dict[str, Slot]:
        """Slots that take pairs side by side at the end of each head."""

        def loader(load: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
            return lambda tensor: load(self._first_halves_first(tensor, num_heads))

        return {name: Slot(slot.shape, loader(slot.load)) for name, slot in table.items()}

    def _first_halves_first(self, rows: Tensor, num_heads: int) -> Tensor:
        size = self._config.rope_head_dim
        kept, turned = rows.reshape(num_heads, -1, *rows.shape[1:]).tensor_split([-size], dim=1)
        return torch.cat((kept, turned[:, 0::2], turned[:, 1::2]), dim=1).flatten(0, 1)

    def _load_heads(self, tensor: Tensor) -> None:
        config = self._config
        by_head = tensor.reshape(config.num_heads, -1, config.kv_lora_rank)[self._heads]
        keys, values = by_head.tensor_split([config.nope_head_dim], dim=1)
        self.into_latent.copy_(keys)
        self.out_of_latent.copy_(values.transpose(1, 2))

    def finish(self) -> tuple[Choice[Any], ...]:
        return self._choices

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        rank, cache = self._config.kv_lora_rank, context.kv_caches[self._layer]
        latent, key = self.latent(x).tensor_split([rank], dim=1)
        latent, _ = self.norm(latent)
        query = self._to_latent(self.query(x))
        angles = context.positions, self._cos_sin
        self._write(query[..., rank:], latent, key, *angles, cache, context.slots)
        mixed = self._attend(query, cache, context.attention, self._config.scale, rank)
        values = torch.bmm(mixed.transpose(0, 1), self.out_of_latent)  # [H, T, value_head_dim]
        y: Tensor = self.output(values.transpose(0, 1).flatten(1))
        return y

    def _to_latent(self, heads: Tensor) -> Tensor:
        """heads [T, H * (nope + rope)] -> queries of the cache's rows, [T, H, head_dim]."""
        by_head = heads.view(len(heads), len(self.into_latent), -1)
        kept, turned = by_head.tensor_split([self._config.nope_head_dim], dim=2)
        absorbed = torch.bmm(kept.transpose(0, 1), self.into_latent).transpose(0, 1)
        return torch.cat((absorbed, turned), dim=-1)
