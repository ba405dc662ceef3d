"""Attention over the paged KV cache. Knows heads and caches; no requests, no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.config import AttentionConfig
from octavo.kernels import (
    KV_WRITE,
    PAGED_ATTENTION,
    PLAIN,
    QK_NORM_ROTARY_KV_WRITE,
    ROTARY_KV_WRITE,
    AttentionKind,
    Choice,
    Op,
)
from octavo.layers.build import Build, Layer
from octavo.layers.context import StepContext
from octavo.layers.norm import QKNorm
from octavo.layers.rotary import Rotary


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of each token: a key and a value for each of its heads."""

    num_kv_heads: int
    head_dim: int
    num_parts: int = 2  # 1: its keys hold its values

    @property
    def num_values_per_token(self) -> int:
        """Numbers stored for each token."""
        return self.num_parts * self.num_kv_heads * self.head_dim


class Attention(Layer):
    """Writes this step's keys and values to layer `layer`'s cache, then attends to all of them.

    With a `rotary` it first rotates queries and keys, in the same pass; with a `qk_norm`, too, it
    normalises them before that.
    """

    def __init__(
        self,
        config: AttentionConfig,
        layer: int,
        build: Build,
        *,
        rotary: Rotary | None = None,
        qk_norm: QKNorm | None = None,
    ):
        super().__init__()
        if rotary is None and qk_norm is not None:
            raise ValueError("there is no kernel for a QK-norm without a rotation after it")
        self.num_heads = build.group.local(config.num_heads, "attention heads")
        self.num_kv_heads = build.group.local(config.num_kv_heads, "key/value heads")
        kind = AttentionKind(config.window, config.logit_softcap)
        case = build.case(
            {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": config.head_dim,
                "block_size": build.block_size,
                **({} if config.rope is None else {"rotary_dim": config.rope.rotary_dim}),
                **kind.sizes(),
            }
        )
        op: Op[Any] = KV_WRITE
        if rotary is not None:
            op = ROTARY_KV_WRITE if qk_norm is None else QK_NORM_ROTARY_KV_WRITE
        self._choices = (op.select(case), PAGED_ATTENTION.select(case))
        self._write: Callable[..., None] = self._choices[0].function
        self._attend: Callable[..., Tensor] = self._choices[1].function
        if kind != PLAIN:
            self._attend = partial(self._attend, kind=kind)
        self._cos_sin = None if rotary is None else rotary.cos_sin
        self._norms: tuple[Any, ...] = ()
        if qk_norm is not None:
            self._norms = (qk_norm.query_weight, qk_norm.key_weight, qk_norm.eps)
        self._layer = layer
        if build.kv_groups and (group := build.kv_groups[layer]):
            self.register_forward_pre_hook(partial(_with_tables_of, group))
        self._scale = config.scale
        self.spec = KVSpec(self.num_kv_heads, config.head_dim)

    def finish(self) -> tuple[Choice[Any], ...]:
        return self._choices

    def parts_of(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """heads [T, Hq + 2 Hkv, D], as one product makes them -> queries, keys, values."""
        num_kv_heads = self.num_kv_heads
        query, key, value = torch.split(heads, [self.num_heads, num_kv_heads, num_kv_heads], 1)
        return query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: StepContext) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] (strided views) -> [T, Hq, D].

        With a rotary, query and key are overwritten.
        """
        cache, slots = context.kv_caches[self._layer], context.slots
        if self._cos_sin is None:
            self._write(key, value, cache, slots)
        else:
            angles = (context.positions, self._cos_sin)
            self._write(query, key, value, *angles, cache, slots, *self._norms)
        return self._attend(query, cache, context.attention, self._scale)


def _with_tables_of(group: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's inputs, the last of which is the step, with the step as its KV group has it.

    A hook, so that the layers of group 0, which are all layers of most models, need not ask.
    """
    context: StepContext = inputs[-1]
    return (*inputs[:-1], context.of_group(group))


def kv_specs(model: nn.Module) -> list[KVSpec]:
    """What each attention layer of a model keeps, in the order of the layers."""
    found = (getattr(module, "spec", None) for module in model.modules())
    return [spec for spec in found if isinstance(spec, KVSpec)]
