"""Which layers share a block table: those that keep the same tokens, cut to groups of one size.

Knows layers by what they keep, and no checkpoints; what groups mean for a sequence's blocks is
`octavo.core.KVGroups`'s.
"""

from collections import Counter
from dataclasses import dataclass

from octavo.config.model import ModelConfig

# Places for layers that a block may have and no layer uses, as a share of the layers. Fewer groups
# mean fewer tables to write; more of them fit the layers better.
MOST_UNUSED = 1 / 8


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The groups of a model's layers.

    windows: of each group; None keeps all tokens.
    num_places: layers that a block has room for; of one group some places may stay empty.
    groups, places: of each layer, the group that it is in and its place in the group's blocks.
    """

    windows: tuple[int | None, ...]
    num_places: int
    groups: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def keep_all(self) -> bool:
        """Whether there is one group, which keeps whole contexts."""
        return self.windows == (None,)


def whole_contexts(model: ModelConfig) -> LayerGroups:
    """One group for all layers that keep anything, windows or not."""
    num_layers = 0 if model.is_encoder else model.num_layers
    return LayerGroups((None,), num_layers, (0,) * num_layers, tuple(range(num_layers)))


def why_not_grouped(model: ModelConfig) -> str | None:
    """Why the layers of a model must keep whole contexts; None where windows can be left behind."""
    attentions = [layer.attention for layer in model.layers]
    if all(attention.window is None for attention in attentions):
        return "no layer has a window"
    if model.is_bridged:
        return "transformers' code runs the model, and may ask for other windows than its config"
    if len({attention.num_cached_values for attention in attentions}) > 1:
        return "its layers keep different amounts of a token, so they cannot share blocks"
    return None


def group_by_window(model: ModelConfig) -> LayerGroups:
    """Layers with equal windows together; those that keep everything come first.

    Each kind is cut to groups of one size, the one that makes fewest groups and leaves at most
    `MOST_UNUSED` of the places empty.
    """
    windows = [layer.attention.window for layer in model.layers]
    kinds = dict(sorted(Counter(windows).items(), key=lambda kind: (kind[0] is not None, kind[0])))
    num_layers = len(windows)

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in kinds.values())

    sizes = range(max(kinds.values()), 0, -1)
    size = next(s for s in sizes if num_groups(s) * s <= num_layers * (1 + MOST_UNUSED))
    size = max(-(-count // -(-count // size)) for count in kinds.values())  # no emptier than needed
    firsts: dict[int | None, int] = {}
    group_windows: list[int | None] = []
    for window, count in kinds.items():
        firsts[window] = len(group_windows)
        group_windows += [window] * -(-count // size)
    seen: Counter[int | None] = Counter()
    groups, places = [], []
    for window in windows:
        group, place = divmod(seen[window], size)
        seen[window] += 1
        groups.append(firsts[window] + group)
        places.append(place)
    return LayerGroups(tuple(group_windows), size, tuple(groups), tuple(places))
