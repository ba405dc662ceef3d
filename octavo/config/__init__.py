"""What is configured, and where each value came from. No torch, no HTTP."""

from octavo.config.architectures import (
    architecture_named,
    architectures,
    model_config_from_hf,
    read_model_config,
)
from octavo.config.checkpoint import ALIASES, Checkpoint, excerpt, locate
from octavo.config.lora import LoRAConfig
from octavo.config.model import (
    AttentionConfig,
    ClassHead,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Rope,
    RopeScaling,
)
from octavo.config.options import (
    DEFAULT_MODEL,
    GROUPS,
    CacheOptions,
    DeviceOptions,
    EngineOptions,
    LoRAOptions,
    ModelOptions,
    SchedulerOptions,
    option,
)
from octavo.config.plugins import Architecture
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
    "Architecture",
    "AttentionConfig",
    "CacheOptions",
    "Checkpoint",
    "ClassHead",
    "DeviceFacts",
    "DeviceOptions",
    "EngineOptions",
    "LatentAttentionConfig",
    "LayerConfig",
    "LoRAConfig",
    "LoRAOptions",
    "MLPConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelOptions",
    "ResolvedConfig",
    "Rope",
    "RopeScaling",
    "SchedulerOptions",
    "Setting",
    "architecture_named",
    "architectures",
    "decode_sizes",
    "excerpt",
    "locate",
    "mixed_sizes",
    "model_config_from_hf",
    "option",
    "read_model_config",
    "resolve",
    "with_eager_steps",
    "with_kv_cache_bytes",
]
