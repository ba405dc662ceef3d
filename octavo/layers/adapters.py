"""LoRA adapters (arXiv 2106.09685) in a model that knows nothing of them.

Each product that adapters may change gets slots for them, and adds what its tokens' adapters make
of its input. Owns which adapter lies in which slot. Knows no requests and no files.

    load_model ─▶ finish_layers ─▶ adapt_model ─▶ the model's own forward, once a step:
                                                  before it     tokens are grouped by adapter
                                                  each product  y = W x, y += B A x
                                                  last block    groups are those of the wanted
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from octavo.config import LoRAConfig
from octavo.errors import IntegrityError
from octavo.kernels import LORA, Case, Choice, LoRAShape
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.moe import MixtureOfExperts
from octavo.layers.slot import Slot
from octavo.quant import StoredWeight


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One adapter on the host: {module: (A [rank, columns], B [rows, rank], scaled)}."""

    rank: int
    modules: Mapping[str, tuple[Tensor, Tensor]]


class AdaptedWeight:
    """A weight, and what adapters add to its product. As `octavo.quant.StoredWeight`."""

    plain = None  # whoever multiplied with it would leave the adapters out

    def __init__(self, weight: StoredWeight, shape: LoRAShape, adapters: "AdapterSlots"):
        self._weight = weight
        self._adapters = adapters
        self._lora = adapters.choice.function
        self.shape = shape
        self.slots = self._lora.allocate(shape, adapters.case)

    def place(self, rows: slice, tensor: Tensor) -> None:
        self._weight.place(rows, tensor)

    def finish(self) -> Choice[Any]:
        return self._weight.finish()

    def gather_rows(self, ids: Tensor) -> Tensor:
        return self._weight.gather_rows(ids)

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self._weight.apply(x, bias)
        self._lora.add(y, x, self.slots, self._adapters.groups)
        return y


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear layer with slots, and its parts as a checkpoint names them."""

    linear: Linear
    weight: AdaptedWeight
    modules: Mapping[str, Slot]


class AdapterSlots:
    """The slots of all products of a model. Sole writer: the model runner.

    find: an adapter on the host, by digest; raises where there is none.
    """

    def __init__(
        self,
        model_slots: Mapping[str, Slot],
        left_out: Iterable[nn.Module],
        config: LoRAConfig,
        *,
        case: Case,
        max_num_tokens: int,
        find: Callable[[str], AdapterWeights],
    ):
        self.case = case
        self.choice = LORA.select(case)
        self._rank = config.max_lora_rank
        self._find = find
        self._free = list(range(config.max_loras - 1, -1, -1))
        self._placed: OrderedDict[str, int] = OrderedDict()  # the one that was used last at the end
        self._num_slots = config.max_loras
        self.tokens = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=case.device)
        self._num_tokens = 0
        self.groups: Any = None  # of the tokens that products see now
        parts: dict[Linear, dict[str, Slot]] = {}
        for name, slot in model_slots.items():
            if slot.linear is not None and slot.linear not in left_out:
                parts.setdefault(slot.linear, {})[name.removesuffix(".weight")] = slot
        self._products = [self._adapt(linear, modules) for linear, modules in parts.items()]

    def _adapt(self, linear: Linear, modules: Mapping[str, Slot]) -> _Product:
        shape = LoRAShape(self._num_slots, self._rank, linear.local_parts, linear.local_in_features)
        weight = AdaptedWeight(linear.weight, shape, self)
        linear.weight = weight
        return _Product(linear, weight, modules)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{module: (rows, columns)} of what an adapter may change."""
        return {
            name: slot.matrix_shape
            for product in self._products
            for name, slot in product.modules.items()
        }

    def slots_of(self, digests: Iterable[str]) -> dict[str, int]:
        """Where these adapters lie from now on: who is not there takes an old one's place."""
        wanted = dict.fromkeys(digests)
        for digest in wanted:
            if digest in self._placed:
                self._placed.move_to_end(digest)
        for digest in wanted:
            if digest not in self._placed:
                self._place(digest, wanted)
        return {digest: self._placed[digest] for digest in wanted}

    def _place(self, digest: str, wanted: Mapping[str, None]) -> None:
        weights = self._find(digest)
        if not self._free:
            oldest = next(iter(self._placed))
            if oldest in wanted:
                raise IntegrityError(f"a step has more than {self._num_slots} adapters")
            self._free.append(self._placed.pop(oldest))
        slot = self._free[-1]
        for product in self._products:
            matrices = product.linear.adapter(
                self._rank,
                (
                    (module, *weights.modules[name])
                    for name, module in product.modules.items()
                    if name in weights.modules
                ),
            )
            self.choice.function.place(product.weight.slots, slot, *matrices)
        self._placed[digest] = self._free.pop()

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a model's forward: group all of its tokens; see that the wanted ones are, too."""
        token_ids, context = args
        self._num_tokens = len(token_ids)
        self.groups = self._group(self.tokens[: self._num_tokens])
        known = {f.name: getattr(context, f.name) for f in fields(StepContext)}
        return token_ids, _AdaptedContext(**known, adapters=self)

    def narrow(self, wanted: Tensor) -> None:
        """From here on products see these tokens alone."""
        self.groups = self._group(self.tokens[: self._num_tokens].index_select(0, wanted))

    def _group(self, adapters: Tensor) -> Any:
        return self.choice.function.group(adapters, self._num_slots)


@dataclass(frozen=True, slots=True)
class _AdaptedContext(StepContext):
    """The geometry of a step whose products must know which tokens they see."""

    adapters: AdapterSlots | None = None

    def wanted_of(self, *hidden: Tensor) -> tuple[Tensor, ...]:
        if self.wanted is not None and self.adapters is not None:
            self.adapters.narrow(self.wanted)
        return StepContext.wanted_of(self, *hidden)


def adapt_model(
    model: nn.Module,
    model_slots: Mapping[str, Slot],
    config: LoRAConfig,
    *,
    case: Case,
    max_num_tokens: int,
    find: Callable[[str], AdapterWeights],
) -> AdapterSlots:
    """Give a model whose layers are finished slots for adapters.

    Routers and experts of mixtures get none.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    left_out = {inner for mixture in mixtures for inner in mixture.modules()}
    adapters = AdapterSlots(
        model_slots, left_out, config, case=case, max_num_tokens=max_num_tokens, find=find
    )
    model.register_forward_pre_hook(adapters.begin)
    return adapters
