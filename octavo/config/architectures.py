"""The one table of architectures: whose configs are read, how, and which model runs them.

A package outside of Octavo adds its own by an entry point of the group `octavo.models` that names
an `Architecture`. Nothing of a checkpoint is ever executed: `auto_map` (code from the checkpoint)
is ignored for architectures that we have and is no way in for others. Knows no tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from octavo.config.checkpoint import Checkpoint
from octavo.config.families.llama import read_llama
from octavo.config.families.qwen3 import read_qwen3
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader, short
from octavo.errors import CheckpointError, ConfigError, ModelError, UnsupportedModelError

ENTRY_POINTS = "octavo.models"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, as transformers names it and as we run it."""

    name: str  # ours: `ModelConfig.architecture`
    hf_name: str  # transformers' class
    model_type: str  # transformers' `model_type`
    read: Callable[[Reader], ModelConfig]
    model: str  # "module:class" of the `octavo.models.Model`, imported when it is asked for
    gguf_names: tuple[str, ...] = ()  # llama.cpp's, where we know its tensors' names, too


BUILT_IN = (
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "llama",
        read_llama,
        "octavo.models.llama:Llama",
        gguf_names=("llama",),
    ),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        read_qwen3,
        "octavo.models.qwen3:Qwen3",
        gguf_names=("qwen3",),
    ),
)


@cache
def architectures() -> dict[str, Architecture]:
    """{our name: architecture}, those of other packages included.

    Raises:
        ConfigError: another package's entry point is no architecture, or takes a name that is
            taken.
    """
    table: dict[str, Architecture] = {}
    for architecture in BUILT_IN:
        table[architecture.name] = architecture
    taken = {architecture.hf_name for architecture in BUILT_IN}
    for entry_point in entry_points(group=ENTRY_POINTS):
        found = entry_point.load()
        if not isinstance(found, Architecture):
            raise ConfigError(
                f"the entry point {entry_point.name!r} of {ENTRY_POINTS!r} is no Architecture: "
                "fix or uninstall the package that brings it"
            )
        if found.name in table or found.hf_name in taken:
            raise ConfigError(
                f"the entry point {entry_point.name!r} of {ENTRY_POINTS!r} brings "
                f"{found.name!r} for {found.hf_name!r}, which is there already: rename it, or "
                "uninstall the package that brings it"
            )
        table[found.name] = found
        taken.add(found.hf_name)
    return table


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config of a located checkpoint. Raises as `model_config_from_hf` does."""
    written, generation_config = checkpoint.config(), checkpoint.generation_config()
    try:
        config = model_config_from_hf(written, generation_config)
    except ModelError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from error
    if checkpoint.kind == "gguf":
        _refuse_unknown_names(checkpoint, architectures()[config.architecture])
    return config


def _refuse_unknown_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
    written_as = checkpoint.gguf.metadata.get("general.architecture")
    if written_as not in architecture.gguf_names:
        known = (name for one in architectures().values() for name in one.gguf_names)
        raise UnsupportedModelError(
            f"{checkpoint.path}: GGUF files of {short(written_as)} are not supported, only of "
            f"{', '.join(known)}; take the model's safetensors"
        )


def model_config_from_hf(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read a `config.json` in the style of transformers 4 or 5.

    Args:
        config: the parsed file.
        generation_config: the parsed `generation_config.json`; its end-of-sequence ids are added
            to those of the config.

    Raises:
        UnsupportedModelError: a sound value that is not supported; the message names it and what
            is supported.
        CheckpointError: a value that is missing, of the wrong type or absurd.
    """
    return architecture_of(config).read(Reader(config, generation_config))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a `config.json` names. Raises as `model_config_from_hf` does."""
    names = config.get("architectures")
    if names is None:
        model_type = config.get("model_type")
        by_type = {one.model_type: one.hf_name for one in architectures().values()}
        known = by_type.get(model_type) if isinstance(model_type, str) else None
        names = [known or model_type]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config: neither 'architectures' nor 'model_type' names the model")
    by_name = {one.hf_name: one for one in architectures().values()}
    if names[0] not in by_name:
        remote = " (it would need code from the checkpoint, which is never run)"
        raise UnsupportedModelError(
            f"the architecture {short(names[0])} is not supported"
            f"{remote if 'auto_map' in config else ''}; supported: {', '.join(by_name)}"
        )
    return by_name[names[0]]
