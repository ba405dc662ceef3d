"""What an engine sets aside for LoRA adapters (arXiv 2106.09685): how many, how large, and where.

Owns the settings and the arithmetic of their memory. Knows no tensors; what an adapter's own files
say is `octavo.config.adapter_files`'.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config.model import LatentAttentionConfig, LayerConfig, MLPConfig, ModelConfig
from octavo.config.options import EngineOptions, LoRAOptions
from octavo.errors import ConfigError

MAX_RANK = 512
MAX_SLOTS = 1024

# Of `octavo.kernels.lora` and its Triton version: rows that the reference multiplies at once; sums
# over parts of the input features, of so many, where few rows would leave most of a GPU idle.
LORA_ROWS = 256
MOST_SPLIT_ROWS, SPLIT_FEATURES, MOST_SPLITS = 1024, 512, 16


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Everything decided about adapters."""

    modules: tuple[tuple[str, str], ...]  # (name, directory) of those that are there at the start
    max_loras: int  # that one step may hold: slots on the device
    max_lora_rank: int
    max_cpu_loras: int  # that may be loaded: copies on the host
    lora_dir: str | None  # below which clients may name directories; None: they may not


@dataclass(frozen=True, slots=True)
class AdaptedProduct:
    """One product of a model whose parts an adapter may change."""

    parts: tuple[int, ...]  # rows of each, which has an A of its own
    columns: int

    def matrices(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of one adapter's matrices: A of all parts, then B of each."""
        return (len(self.parts) * rank, self.columns), *((rows, rank) for rows in self.parts)


def resolve_lora(
    options: EngineOptions, model: ModelConfig, note: Callable[[str, Any, str], Any]
) -> LoRAConfig | None:
    """The settings of adapters; None where they are off.

    Args:
        options: what the user set.
        model: that the adapters are for.
        note: writes a value down, by name, with the reason for its default.

    Raises:
        ConfigError: adapters cannot be had with this model, or not like that.
    """
    given = options.lora
    enabled = note("enable_lora", given.enable_lora, "costs memory, and a product more a layer")
    if not enabled:
        for name in sorted(options.changed() & set(LoRAOptions.__dataclass_fields__)):
            raise ConfigError(f"{name} is about LoRA adapters: give enable_lora, too")
        return None
    _refuse_model(model)
    modules = parse_modules(given.lora_modules)
    if given.max_lora_rank > MAX_RANK or given.max_loras > MAX_SLOTS:
        raise ConfigError(
            f"max_lora_rank must be at most {MAX_RANK} and max_loras at most {MAX_SLOTS}, got "
            f"{given.max_lora_rank} and {given.max_loras}"
        )
    most = given.max_cpu_loras
    if most < max(given.max_loras, len(modules)):
        raise ConfigError(
            f"max_cpu_loras is {most}, but there are {len(modules)} lora_modules and max_loras is "
            f"{given.max_loras}; raise it"
        )
    if given.lora_dir is not None and not Path(given.lora_dir).is_dir():
        raise ConfigError(f"lora_dir {given.lora_dir} is no directory")
    note("lora_modules", " ".join(given.lora_modules), "none at the start")
    note("max_loras", given.max_loras, "slots on the device")
    note("max_lora_rank", given.max_lora_rank, "the usual rank")
    note("max_cpu_loras", most, "copies on the host")
    note("lora_dir", given.lora_dir, "clients may load none")
    return LoRAConfig(modules, given.max_loras, given.max_lora_rank, most, given.lora_dir)


def parse_modules(modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """("name=directory", ...) -> ((name, directory), ...)

    Raises:
        ConfigError: one is not of that form, or a name comes twice.
    """
    pairs = [module.partition("=") for module in modules]
    for module, (name, _, path) in zip(modules, pairs, strict=True):
        if not name or not path:
            raise ConfigError(f"lora_modules takes name=directory, got {module!r}")
        if [other for other, _, _ in pairs].count(name) > 1:
            raise ConfigError(f"lora_modules has the name {name!r} twice; choose another for one")
    return tuple((name, path) for name, _, path in pairs)


def _refuse_model(model: ModelConfig) -> None:
    why = None
    if model.is_bridged:
        why = "transformers' own modules run it"
    elif model.is_encoder:
        why = "it is an encoder"
    elif model.vision is not None:
        why = "it sees images"
    elif any(isinstance(layer.attention, LatentAttentionConfig) for layer in model.layers):
        why = "its attention is latent (MLA)"
    if why is not None:
        raise ConfigError(
            f"enable_lora is for decoders of octavo's own layers, and of this model {why}; leave "
            "it out, or merge the adapter into the weights"
        )


def adapted_products(layer: LayerConfig, hidden_size: int) -> Iterator[AdaptedProduct]:
    """Attention's two, and the MLP's where it has no experts."""
    attention, mlp = layer.attention, layer.mlp
    key_rows = attention.num_key_values
    yield AdaptedProduct((attention.num_query_values, key_rows, key_rows), hidden_size)
    yield AdaptedProduct((hidden_size,), attention.num_query_values)
    if isinstance(mlp, MLPConfig):
        yield AdaptedProduct((mlp.intermediate_size,) * (1 + mlp.gated), hidden_size)
        yield AdaptedProduct((hidden_size,), mlp.intermediate_size)


def slot_matrices(model: ModelConfig, lora: LoRAConfig) -> Iterator[tuple[int, int]]:
    """(rows, columns) of the matrices of one slot, whether an adapter fills it or not."""
    for layer in model.layers:
        for product in adapted_products(layer, model.hidden_size):
            yield from product.matrices(lora.max_lora_rank)


def num_splits(num_tokens: int, in_features: int, *, invariant: bool) -> int:
    """Into how many sums the product with A is cut on a GPU."""
    if invariant or num_tokens > MOST_SPLIT_ROWS:
        return 1
    return min(MOST_SPLITS, -(-in_features // SPLIT_FEATURES))


def inside(directory: str, name: str) -> Path:
    """The directory called `name`, which must really lie below another: links are followed first.

    Raises:
        ConfigError: it does not, or is not there.
    """
    try:
        top = Path(directory).resolve(strict=True)
        found = (top / name).resolve(strict=True)
        files = [file.resolve(strict=True) for file in found.iterdir()]
    except (OSError, ValueError, RuntimeError):
        raise ConfigError("there is no such directory in lora_dir") from None
    if found == top or not all(path.is_relative_to(top) for path in (found, *files)):
        raise ConfigError("there is no such directory in lora_dir")
    return found
