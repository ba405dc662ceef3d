"""From options to a running engine core: the one place that puts all parts together."""

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
from octavo.core import Clock, SystemClock
from octavo.engine.core import EngineCore
from octavo.kvcache import PagedAllocator, PrefixAllocator
from octavo.layers import Build, KernelReport, finish_layers, kv_specs
from octavo.models import Model, create_model
from octavo.runner import ModelRunner, allocate_kv_caches, device_facts, measure_kv_cache_bytes
from octavo.scheduler import (
    Blocks,
    Constraint,
    PrefillSpeed,
    QueueBounds,
    Scheduler,
    SequenceSlots,
    TokenBudget,
    create_batching,
    create_queue,
)
from octavo.weights import dummy_tensors, load_weights, read_tensors

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
    with phase("load weights"):
        model = load_model(checkpoint, config)
    with phase("lay out weights for kernels"):
        kernels = finish_layers(model)
    with phase("allocate KV cache"):
        if config.kv_cache_bytes is None:
            config = with_kv_cache_bytes(config, measure_kv_cache_bytes(model, config))
        num_blocks = (config.kv_cache_bytes or 0) // config.kv_block_bytes
        runner = create_runner(model, config, num_blocks)
    scheduler = create_scheduler(config, num_blocks)
    core = EngineCore(
        scheduler,
        runner,
        asynchronous=config.async_scheduling,
        check_integrity=check_integrity,
    )
    return BuiltEngine(core, checkpoint, config, num_blocks, kernels)


def load_model(checkpoint: Checkpoint, config: ResolvedConfig) -> Model:
    """The model with its weights in place, not yet laid out for kernels."""
    dtype = getattr(torch, config.dtype)
    dummy = config.load_format == "dummy"
    # Opened first: a damaged file is refused before anything is allocated for it.
    tensors = None if dummy else read_tensors(checkpoint, config.model, dtype=dtype)
    build = Build(config.device, dtype, config.block_size)
    model = create_model(config.model, build, max_positions=config.max_model_len)
    slots = model.slots()
    load_weights(slots, tensors or dummy_tensors(slots, dtype=dtype, device=config.device))
    return model


def create_runner(model: Model, config: ResolvedConfig, num_blocks: int) -> ModelRunner:
    """The executor of a model, with KV storage of its own."""
    kv_caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    return ModelRunner(
        model,
        kv_caches,
        block_size=config.block_size,
        device=config.device,
        num_threads=config.num_threads,
    )


def create_scheduler(
    config: ResolvedConfig, num_blocks: int, *, clock: Clock | None = None
) -> Scheduler:
    """The scheduler with the constraints that every engine has."""
    clock = clock or SystemClock()
    kind = PrefixAllocator if config.enable_prefix_caching else PagedAllocator
    allocator = kind(num_blocks, config.block_size)
    constraints: list[Constraint] = [
        TokenBudget(config.max_num_batched_tokens),
        SequenceSlots(config.max_num_seqs),
        Blocks(allocator),
    ]
    speed = PrefillSpeed()
    return Scheduler(
        allocator,
        constraints,
        max_model_len=config.max_model_len,
        queue=create_queue(config.scheduling_policy),
        batching=create_batching(config.batching, clock, max_num_seqs=config.max_num_seqs),
        bounds=QueueBounds(
            speed,
            # Those that could be admitted at once do not really wait.
            max_num_reqs=config.max_num_seqs + config.max_num_queued_reqs,
            max_num_tokens=config.max_num_queued_tokens,
        ),
        clock=clock,
    )
