"""What is configured, and where each value came from. No torch, no HTTP."""

from octavo.config.checkpoint import ALIASES, Checkpoint, excerpt, locate
from octavo.config.model import ModelConfig, RopeScaling
from octavo.config.options import (
    DEFAULT_MODEL,
    GROUPS,
    CacheOptions,
    DeviceOptions,
    EngineOptions,
    ModelOptions,
    SchedulerOptions,
    option,
)
from octavo.config.resolve import (
    DeviceFacts,
    ResolvedConfig,
    Setting,
    resolve,
    with_eager_steps,
    with_kv_cache_bytes,
)
from octavo.config.step_sizes import decode_sizes, mixed_sizes

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "GROUPS",
    "CacheOptions",
    "Checkpoint",
    "DeviceFacts",
    "DeviceOptions",
    "EngineOptions",
    "ModelConfig",
    "ModelOptions",
    "ResolvedConfig",
    "RopeScaling",
    "SchedulerOptions",
    "Setting",
    "decode_sizes",
    "excerpt",
    "locate",
    "mixed_sizes",
    "option",
    "resolve",
    "with_eager_steps",
    "with_kv_cache_bytes",
]
