"""Our paged attention inside the modules of transformers, each of which it hands its heads to.

transformers calls what is registered under the name in a model's config, and hands on to it what a
caller of the model adds. Added is a callable, `octavo`: at first a `Survey`, which notes what each
layer asks for, then, in every step, `paged`, which knows the step. There is no global.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from octavo.config import AttentionConfig
from octavo.errors import UnsupportedModelError
from octavo.layers.context import StepContext

NAME = "octavo"
# What attention is told beside its heads: what we apply, and what means nothing here. A value for
# anything else, attention sinks for instance, is refused.
APPLIED = {"scaling", "sliding_window", "softcap"}
MEANINGLESS = {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"}

Attend = Callable[..., Tensor]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, Hq, T, D], key, value [1, Hkv, T, D] -> [1, T, Hq, D].

    Raises:
        UnsupportedModelError: the blocks of this model keep `octavo` to themselves.
    """
    function: Attend | None = told.pop(NAME, None)
    if function is None:
        raise UnsupportedModelError("its blocks do not hand on to attention what a caller adds")
    return function(module, query, key, value, mask=mask, **told), None


# No masks are made under a name that has none registered.
ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def paged(context: StepContext) -> Attend:
    """Attention for the tokens of one step, by the `Attention` that each module was given."""

    def run(module: Any, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        heads = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, H, D]
        attended: Tensor = module.attend(*heads, context)
        return attended[None]

    return run


@dataclass(slots=True)
class Survey:
    """Attends to nothing, and notes which modules attend, in their order, and how."""

    shapes: tuple[AttentionConfig, ...]  # of each layer, as the config has it
    found: list[tuple[nn.Module, AttentionConfig]] = field(default_factory=list)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None,
        **told: Any,
    ) -> Tensor:
        layer = len(self.found)
        if layer == len(self.shapes) or any(module is other for other, _ in self.found):
            raise UnsupportedModelError(f"attention runs more often than in {layer} layers")
        strange = {k for k, v in told.items() if v is not None} - APPLIED - MEANINGLESS
        strange |= {"mask"} if mask is not None else set()
        if strange:
            raise UnsupportedModelError(f"layer {layer}'s attention has {', '.join(strange)}")
        if told.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"layer {layer} attends to tokens that come later, too")
        shape = self.shapes[layer]
        sizes = query.shape[1], key.shape[1], query.shape[3], key.shape[3], value.shape[3]
        if sizes != (shape.num_heads, shape.num_kv_heads, *3 * (shape.head_dim,)):
            raise UnsupportedModelError(
                f"layer {layer} has {sizes[0]} and {sizes[1]} heads with queries, keys and values "
                f"of {sizes[2:]} numbers, but its config says {shape.num_heads} and "
                f"{shape.num_kv_heads} heads of {shape.head_dim}"
            )
        scale, window, softcap = (told.get(n) for n in ("scaling", "sliding_window", "softcap"))
        scale = shape.scale if scale is None else scale
        asked = replace(shape, scale=scale, window=window, logit_softcap=softcap)
        self.found.append((module, asked))
        return query.transpose(1, 2)

    def layers(self) -> list[tuple[nn.Module, AttentionConfig]]:
        """The modules and what they ask for, once the model ran.

        Raises:
            UnsupportedModelError: some layers did not attend, or not through this.
        """
        missing = len(self.shapes) - len(self.found)
        if missing:
            raise UnsupportedModelError(
                f"{missing} of {len(self.shapes)} layers do not attend, or not where transformers "
                "lets others do it; a recurrent state has no place in a KV cache"
            )
        return self.found
