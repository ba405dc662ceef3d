"""From options to a running engine core: the one place that puts all parts together."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from octavo.config import (
    Checkpoint,
    EngineOptions,
    ModelConfig,
    ResolvedConfig,
    locate,
    resolve,
    with_kv_cache_bytes,
)
from octavo.engine.core import EngineCore
from octavo.kvcache import PagedAllocator
from octavo.layers import Build, KernelReport, finish_layers, kv_specs
from octavo.models import create_model
from octavo.runner import ModelRunner, allocate_kv_caches, device_facts, measure_kv_cache_bytes
from octavo.scheduler import Blocks, Scheduler, SequenceSlots, TokenBudget
from octavo.weights import dummy_tensors, load_weights, read_tensors

logger = logging.getLogger(__name__)

PhaseListener = Callable[[str, float], None]  # (phase, seconds it took)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine core and what was decided while it was built."""

    core: EngineCore
    checkpoint: Checkpoint
    config: ResolvedConfig
    num_blocks: int
    kernels: tuple[KernelReport, ...]


def build_engine(
    options: EngineOptions,
    *,
    on_phase: PhaseListener = lambda phase, seconds: None,
    check_integrity: bool = False,
) -> BuiltEngine:
    """Read the checkpoint, load the model and allocate its KV cache.

    Raises:
        ConfigError: what the options ask for cannot be had.
        ModelError: the model cannot be found, read or run.
    """

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        on_phase(name, time.perf_counter() - start)

    with phase("read config"):
        checkpoint = locate(options.model)
        model_config = ModelConfig.from_checkpoint(checkpoint)
        config = resolve(options, model_config, device_facts(options.device.device))
    torch.set_num_threads(config.num_threads)
    dtype = getattr(torch, config.dtype)
    with phase("load weights"):
        build = Build(config.device, dtype)
        model = create_model(model_config, build, max_positions=config.max_model_len)
        slots = model.slots()
        load_weights(
            slots,
            dummy_tensors(slots, dtype=dtype)
            if config.load_format == "dummy"
            else read_tensors(checkpoint, model_config, dtype=dtype),
        )
    with phase("lay out weights for kernels"):
        kernels = finish_layers(model)
    with phase("allocate KV cache"):
        if config.kv_cache_bytes is None:
            config = with_kv_cache_bytes(config, measure_kv_cache_bytes(model, config))
        num_blocks = (config.kv_cache_bytes or 0) // config.kv_block_bytes
        kv_caches = allocate_kv_caches(
            kv_specs(model),
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=config.device,
        )
    runner = ModelRunner(model, kv_caches, block_size=config.block_size, device=config.device)
    allocator = PagedAllocator(num_blocks, config.block_size)
    scheduler = Scheduler(
        allocator,
        [
            TokenBudget(config.max_num_batched_tokens),
            SequenceSlots(config.max_num_seqs),
            Blocks(allocator),
        ],
        max_model_len=config.max_model_len,
    )
    core = EngineCore(scheduler, runner, check_integrity=check_integrity)
    return BuiltEngine(core, checkpoint, config, num_blocks, kernels)
