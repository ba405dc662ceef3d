"""Devices to plan for: this machine's, or ones that are not here.

Owns the table of known GPUs and a look at this machine without torch. Knows no models. A running
engine asks torch instead (`octavo.runner.device_facts`).
"""

import os
import re
import subprocess
from dataclasses import dataclass

from octavo.config.memory_plan import DeviceBudget
from octavo.config.planned_steps import HOPPER
from octavo.config.resolve import DeviceFacts
from octavo.errors import ConfigError

GIB = 2**30
MIB = 2**20

CPU_NAME = re.compile(r"cpu-(\d+)gib")


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """Memory is what CUDA reports as total: the chip's less what the driver keeps for itself."""

    name: str
    total_bytes: int
    major: int  # compute capability


# Totals as torch prints them ("GPU 0 has a total capacity of ..."), and where each was read.
# Drivers differ by up to 0.1 GiB.
KNOWN_GPUS: dict[str, KnownGpu] = {
    # torch.cuda.mem_get_info() on an H100 80GB HBM3, driver 580
    "h100-80gb": KnownGpu("NVIDIA H100 80GB", 85_017_493_504, 9),
    # in most out-of-memory messages of H200s, which say 139.72, 139.80 or 139.81
    "h200-141gb": KnownGpu("NVIDIA H200 141GB", int(139.80 * GIB), 9),
    # github.com/wbfwonderful/Vad-R1 issue 11
    "a100-80gb": KnownGpu("NVIDIA A100 80GB", int(79.25 * GIB), 8),
    # github.com/TianheWu/CoSeR issue 10
    "a100-40gb": KnownGpu("NVIDIA A100 40GB", int(39.50 * GIB), 8),
    # github.com/stepfun-ai/Step-Video-T2V issue 8
    "l40s-48gb": KnownGpu("NVIDIA L40S 48GB", int(44.42 * GIB), 8),
    # github.com/ali-vilab/VGen issue 104
    "rtx4090-24gb": KnownGpu("NVIDIA RTX 4090 24GB", int(23.64 * GIB), 8),
}

# What a process takes of a GPU outside torch's allocator: measured on an H100 with torch 2.11 and
# CUDA 13 as total - free - reserved, before the first kernel and after the largest step.
CUDA_CONTEXT_BYTES = 527 * MIB
LOADED_KERNELS_BYTES = 160 * MIB


def planned_device(name: str, memory_gib: float | None = None) -> tuple[DeviceFacts, int]:
    """(facts, major compute capability or 0) of the device called `name`.

    `name` is "auto", "cpu" or "cuda" for this machine, a key of `KNOWN_GPUS`, or "cpu-64gib" and
    the like. `memory_gib` replaces its memory.

    Raises:
        ConfigError: nobody knows such a device, or this machine lacks it.
    """
    if memory_gib is not None and not 0 < memory_gib < 2**20:
        raise ConfigError(f"--device-memory-gib must be positive, got {memory_gib}")
    replaced = None if memory_gib is None else int(memory_gib * GIB)
    cores = len(os.sched_getaffinity(0))
    if match := CPU_NAME.fullmatch(name):
        total = replaced or int(match[1]) * GIB
        return DeviceFacts("cpu", f"CPU with {total / GIB:g} GiB", cores, total, total), 0
    if gpu := KNOWN_GPUS.get(name):
        total = replaced or gpu.total_bytes
        return DeviceFacts("cuda", gpu.name, cores, total, total), gpu.major
    if name not in ("auto", "cpu", "cuda"):
        known = ", ".join(KNOWN_GPUS)
        raise ConfigError(
            f"--device {name!r} is not known; there are auto, cpu and cuda (this machine's), "
            f"cpu-64gib and the like, and {known}. For another GPU: --device cuda "
            "--device-memory-gib N"
        )
    if replaced and name != "cpu":
        return DeviceFacts("cuda", f"GPU with {memory_gib:g} GiB", cores, replaced, replaced), 0
    return _this_machine(name, cores, replaced)


def _this_machine(name: str, cores: int, replaced: int | None) -> tuple[DeviceFacts, int]:
    gpu = None if name == "cpu" else _local_gpu(cores)
    if gpu is not None:
        return gpu
    if name == "cuda":
        raise ConfigError(
            "nvidia-smi shows no GPU here; plan for one that is elsewhere with --device "
            f"{next(iter(KNOWN_GPUS))}, or --device cuda --device-memory-gib N"
        )
    if replaced:
        return DeviceFacts("cpu", f"CPU with {replaced / GIB:g} GiB", cores, replaced, replaced), 0
    free, total = host_memory()
    return DeviceFacts("cpu", f"this CPU, {cores} cores", cores, free, total), 0


def _local_gpu(cores: int) -> tuple[DeviceFacts, int] | None:
    """The first GPU that nvidia-smi lists; None where there is none."""
    query = "name,memory.total,memory.reserved,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name, total, reserved, free, capability = printed.stdout.splitlines()[0].split(", ")
        # What the driver reserves is not CUDA's to give.
        usable = (int(total) - int(reserved)) * MIB
        facts = DeviceFacts("cuda", name, cores, min(int(free) * MIB, usable), usable)
        return facts, int(capability.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of host memory, from /proc/meminfo."""
    sizes: dict[str, int] = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, value = line.split(":", 1)
            sizes[name] = int(value.split()[0]) * 1024
    return sizes["MemAvailable"], sizes["MemTotal"]


def device_budget(
    facts: DeviceFacts,
    *,
    major: int,
    utilization: float,
    has_context: bool = False,
) -> DeviceBudget:
    """What an engine may fill of a device.

    Args:
        facts: the device.
        major: its compute capability.
        utilization: `gpu_memory_utilization`.
        has_context: the free memory was read by the engine's process, which has a context then.
    """
    others = facts.total_memory_bytes - facts.free_memory_bytes
    if facts.kind == "cpu":
        return DeviceBudget(facts.name, facts.total_memory_bytes, facts.total_memory_bytes, others)
    return DeviceBudget(
        facts.name,
        facts.total_memory_bytes,
        int(facts.total_memory_bytes * utilization),
        others + LOADED_KERNELS_BYTES + (0 if has_context else CUDA_CONTEXT_BYTES),
        cublas_workspace_bytes(major),
        major,
    )


def cublas_workspace_bytes(major: int) -> int:
    """What torch allocates for cuBLAS at the first matrix product.

    32 MiB from Hopper on, else 2 buffers of 4 MiB and 8 of 16 KiB: torch's defaults for
    CUBLAS_WORKSPACE_CONFIG, ATen/cuda/CublasHandlePool.cpp.
    """
    return 32 * MIB if major >= HOPPER else 2 * 4 * MIB + 8 * 16 * 1024
