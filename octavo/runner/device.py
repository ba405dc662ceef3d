"""What the devices of this machine offer. The one place that asks."""

import os

import torch

from octavo.config import DeviceFacts
from octavo.config.planned_devices import host_memory
from octavo.errors import ConfigError


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def device_facts(wanted: str) -> DeviceFacts:
    """Facts about the device that `wanted` ("auto", "cpu" or "cuda") names.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda was asked for, but torch sees no NVIDIA GPU; use --device cpu, or check "
            "the driver and that a CUDA build of torch is installed"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        free, total = host_memory()
        return DeviceFacts("cpu", f"CPU, {usable_cores()} cores", usable_cores(), free, total)
    # An engine that was here before left its memory to torch. A workspace that were carved out of
    # such a segment would hold all of it for ever.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return DeviceFacts("cuda", torch.cuda.get_device_name(), usable_cores(), free, total)
