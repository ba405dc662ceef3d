"""Architectures, one file each: wiring and checkpoint names. Imported when asked for."""

import importlib
from typing import cast

from octavo.config import ModelConfig, architectures
from octavo.layers import Build
from octavo.models.base import Model


def create_model(config: ModelConfig, build: Build, *, max_positions: int) -> Model:
    """An empty model whose slots wait for weights."""
    module, name = architectures()[config.architecture].model.split(":")
    factory = getattr(importlib.import_module(module), name)
    return cast(Model, factory(config, build, max_positions=max_positions))


__all__ = ["Model", "create_model"]
