"""What the devices of this machine offer. The one place that asks."""

import ctypes
import gc
import os
from pathlib import Path

import torch

from octavo.config import DeviceFacts
from octavo.config.planned_devices import host_memory
from octavo.errors import ConfigError


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def taken_bytes(device: str) -> int:
    """Of the device's memory by this process, as others see it: torch's, or resident memory.

    0 where the system does not tell.
    """
    if device == "cuda":
        return torch.cuda.memory_reserved()
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def give_back_freed_memory(device: str) -> None:
    """Let others have what was freed here: allocators keep it for their next caller otherwise."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        # One for each stream that was multiplied on; they may lie in the memory of a graph.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


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
