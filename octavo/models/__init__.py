"""Architectures, one file each: wiring and checkpoint names. Imported when asked for."""

import importlib
from typing import cast

from octavo.config import ModelConfig, architecture_named
from octavo.config.plugins import OURS
from octavo.errors import ConfigError
from octavo.layers import Build
from octavo.models.base import Model


def create_model(config: ModelConfig, build: Build, *, max_positions: int) -> Model:
    """An empty model whose slots wait for weights.

    Raises:
        ConfigError: another package brings the architecture, and its model cannot be imported.
    """
    architecture = architecture_named(config.architecture)
    try:
        module, name = architecture.model.split(":")
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # a stranger's module may fail in any way; ours has a traceback
        if architecture.package == OURS:
            raise
        raise ConfigError(
            f"the package {architecture.package} names {architecture.model!r} as the model of "
            f"{architecture.hf_name}, which cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return cast(Model, factory(config, build, max_positions=max_positions))


__all__ = ["Model", "create_model"]
