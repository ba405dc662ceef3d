"""Slots for adapters in a model that was built, and the registry of those that go there.

Where adapters are off nothing of this is made, and the model is what it was.
"""

from functools import partial

import torch

from octavo.config import ResolvedConfig
from octavo.engine.adapters import AdapterRegistry
from octavo.errors import ConfigError, RequestError
from octavo.layers import Build, KernelReport, adapt_model, finish_layers
from octavo.models import Model
from octavo.weights import read_adapter


def create_registry(config: ResolvedConfig) -> AdapterRegistry:
    """The registry of an engine; where it serves no adapters, it is off."""
    if config.lora is None:
        return AdapterRegistry()
    dtype = getattr(torch, config.dtype)
    read = partial(read_adapter, max_rank=config.lora.max_lora_rank, dtype=dtype)
    return AdapterRegistry(config.lora, read)


def lay_out(
    model: Model, config: ResolvedConfig, registry: AdapterRegistry
) -> tuple[KernelReport, ...]:
    """Finish a model's layers, and give them slots for adapters where there may be some."""
    kernels = finish_layers(model)
    if config.lora is None:
        return kernels
    build = Build(
        config.device, getattr(torch, config.dtype), batch_invariant=config.batch_invariant
    )
    slots = adapt_model(
        model,
        model.slots(),
        config.lora,
        case=build.case(),
        max_num_tokens=config.max_num_batched_tokens,
        find=registry.copy_of,
    )
    model.adapters, registry.shapes = slots, slots.shapes
    return (*kernels, KernelReport("adapters", slots.choice))


def load_first(config: ResolvedConfig, registry: AdapterRegistry) -> None:
    """Load the adapters that the options name.

    Raises:
        ConfigError: one cannot be read, or does not fit.
    """
    for name, directory in () if config.lora is None else config.lora.modules:
        try:
            registry.load(name, directory)
        except RequestError as error:
            raise ConfigError(f"lora_modules: {name}={directory}: {error}") from error
