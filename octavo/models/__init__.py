"""Architectures, one file each: wiring and checkpoint names. Found by name in one lazy table."""

import importlib
from typing import cast

from octavo.config import ModelConfig
from octavo.errors import UnsupportedModelError
from octavo.layers import Build
from octavo.models.base import Model

# ModelConfig.architecture -> (module, class). Imported when asked for.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("octavo.models.llama", "Llama"),
    "qwen3": ("octavo.models.qwen3", "Qwen3"),
}


def create_model(config: ModelConfig, build: Build, *, max_positions: int) -> Model:
    """An empty model whose slots wait for weights."""
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no model for architecture {config.architecture!r}; there are: "
            + ", ".join(sorted(ARCHITECTURES))
        )
    module, name = ARCHITECTURES[config.architecture]
    factory = getattr(importlib.import_module(module), name)
    return cast(Model, factory(config, build, max_positions=max_positions))


__all__ = ["ARCHITECTURES", "Model", "create_model"]
