"""Runs plans on a device: rows, inputs, KV storage, sampling. Knows no HTTP and no text."""

from octavo.runner.device import (
    device_facts,
    give_back_freed_memory,
    taken_bytes,
    usable_cores,
)
from octavo.runner.disk_file import DiskFile
from octavo.runner.host_copies import HostCopies, reachable_storages
from octavo.runner.images import create_image_store
from octavo.runner.kv_storage import KVStorage, allocate_kv_caches
from octavo.runner.memory import compile_kernels, measure_kv_cache_bytes, start_compiler
from octavo.runner.model_runner import ModelRunner
from octavo.runner.rows import StepLimits, step_limits

__all__ = [
    "DiskFile",
    "HostCopies",
    "KVStorage",
    "ModelRunner",
    "StepLimits",
    "allocate_kv_caches",
    "compile_kernels",
    "create_image_store",
    "device_facts",
    "give_back_freed_memory",
    "measure_kv_cache_bytes",
    "start_compiler",
    "reachable_storages",
    "step_limits",
    "taken_bytes",
    "usable_cores",
]
