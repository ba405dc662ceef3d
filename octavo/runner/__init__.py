"""Runs plans on a device: rows, inputs, KV storage, sampling. Knows no HTTP and no text."""

from octavo.runner.device import device_facts, usable_cores
from octavo.runner.disk_file import DiskFile
from octavo.runner.kv_storage import KVStorage, allocate_kv_caches
from octavo.runner.memory import compile_kernels, measure_kv_cache_bytes, start_compiler
from octavo.runner.model_runner import ModelRunner
from octavo.runner.rows import StepLimits, step_limits

__all__ = [
    "DiskFile",
    "KVStorage",
    "ModelRunner",
    "StepLimits",
    "allocate_kv_caches",
    "compile_kernels",
    "device_facts",
    "measure_kv_cache_bytes",
    "start_compiler",
    "step_limits",
    "usable_cores",
]
