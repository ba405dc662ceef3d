"""Architectures that other installed packages bring, by entry points of the group `octavo.models`.

An entry point is named like the class in a config's `architectures`, so that a package is imported
only where a model needs it, and a broken one costs its own models alone. Nothing is ever taken from
a checkpoint or from a network: what is installed here was installed on purpose. Knows no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from octavo.config.model import ModelConfig
from octavo.config.reading import Reader
from octavo.errors import ConfigError

ENTRY_POINTS = "octavo.models"
OURS = "octavo"
EVERY_ARCHITECTURE = "tests/models/test_every_architecture.py"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, as transformers names it and as we run it."""

    name: str  # ours: `ModelConfig.architecture`
    hf_name: str  # transformers' class
    model_type: str  # transformers' `model_type`
    read: Callable[[Reader], ModelConfig]
    model: str  # "module:class" of the `octavo.models.Model`, imported when it is asked for
    gguf_names: tuple[str, ...] = ()  # llama.cpp's, where we know its tensors' names, too
    package: str = OURS  # that brings it; of others, their entry point says it
    # For the table of models in the README.
    family: str = ""  # the models that it runs, as they are known
    features: str = ""  # what it has that Llama 2 has not
    parity: str = EVERY_ARCHITECTURE  # the test that holds it to transformers


def plugin_names() -> tuple[str, ...]:
    """Classes that other packages bring. None of these packages is imported for it."""
    return tuple(_installed())


@cache
def load_plugin(hf_name: str) -> Architecture:
    """Import what another package brings for a class of `plugin_names`.

    Raises:
        ConfigError: the package cannot be imported, brings something else, or is not alone.
    """
    first, *others = _installed()[hf_name]
    if others:
        packages = ", ".join(map(_package, (first, *others)))
        raise ConfigError(f"{hf_name} is brought by {packages}: uninstall all but one of them")
    package = _package(first)
    try:
        found = first.load()
    except Exception as error:  # it runs a stranger's module, which may fail in any way
        raise ConfigError(
            f"the package {package}, which brings {hf_name}, cannot be imported: "
            f"{type(error).__name__}: {error}; fix or uninstall it"
        ) from error
    if not isinstance(found, Architecture):
        raise ConfigError(
            f"the package {package} brings for {hf_name} a {type(found).__name__}, which is no "
            f"octavo.config.Architecture: fix {first.value!r} or uninstall it"
        )
    if found.hf_name != hf_name:
        raise ConfigError(
            f"the package {package} brings {found.hf_name!r} by an entry point that is called "
            f"{hf_name!r}: both must be the class in a config's 'architectures'"
        )
    return replace(found, package=package)


@cache
def _installed() -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=lambda one: one.name):
        found[entry_point.name] = (*found.get(entry_point.name, ()), entry_point)
    return found


def _package(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    return entry_point.module if distribution is None else distribution.name
