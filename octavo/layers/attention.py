"""Attention over the paged KV cache. Knows heads and caches; no requests, no weights."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from octavo.kernels import KV_WRITE, PAGED_ATTENTION, ROTARY_KV_WRITE, Choice
from octavo.layers.build import Build, Layer
from octavo.layers.context import StepContext
from octavo.layers.rotary import Rotary


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of each token: a key and a value for each of its heads."""

    num_kv_heads: int
    head_dim: int

    @property
    def num_values_per_token(self) -> int:
        """Numbers stored for each token."""
        return 2 * self.num_kv_heads * self.head_dim


class Attention(Layer):
    """Writes this step's keys and values to layer `layer`'s cache, then attends to all of them.

    With a `rotary` it first rotates queries and keys, in the same pass.
    """

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        build: Build,
        *,
        rotary: Rotary | None = None,
    ):
        super().__init__()
        case = build.case(
            {
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "block_size": build.block_size,
            }
        )
        write, rotate_and_write = KV_WRITE.select(case), ROTARY_KV_WRITE.select(case)
        attend = PAGED_ATTENTION.select(case)
        self._choices = (write if rotary is None else rotate_and_write, attend)
        self._write, self._rotate_and_write = write.function, rotate_and_write.function
        self._attend = attend.function
        self._cos_sin = None if rotary is None else rotary.cos_sin
        self._layer = layer
        self._scale = head_dim**-0.5
        self.spec = KVSpec(num_kv_heads, head_dim)

    def finish(self) -> tuple[Choice[Any], ...]:
        return self._choices

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: StepContext) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] (strided views) -> [T, Hq, D].

        With a rotary, query and key are rotated in place.
        """
        cache, slots = context.kv_caches[self._layer], context.slots
        if self._cos_sin is None:
            self._write(key, value, cache, slots)
        else:
            self._rotate_and_write(
                query, key, value, context.positions, self._cos_sin, cache, slots
            )
        return self._attend(query, cache, context.attention, self._scale)


def kv_specs(model: nn.Module) -> list[KVSpec]:
    """What each attention layer of a model keeps, in the order of the layers."""
    return [module.spec for module in model.modules() if isinstance(module, Attention)]
