"""From options to a running engine core: the one place that puts all parts together."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from octavo import kvcache
from octavo.config import (
    Checkpoint,
    EngineOptions,
    ResolvedConfig,
    locate,
    read_model_config,
    resolve,
    with_eager_steps,
    with_kv_cache_bytes,
)
from octavo.core import Launch
from octavo.engine.adapted import create_registry, lay_out, load_first
from octavo.engine.adapters import AdapterRegistry
from octavo.engine.core import EngineCore
from octavo.engine.grammars import LazyGrammars
from octavo.engine.kv_tiers import kv_fingerprint, open_disk
from octavo.engine.memory_report import MemoryMeter, MemoryReport
from octavo.engine.sleep import SleepableExecutor
from octavo.kernels import LATENT_ATTENTION, LORA, MOE_EXPERTS, PAGED_ATTENTION
from octavo.kernels.dispatch import REFERENCE
from octavo.kvcache import Allocator, TieredAllocator
from octavo.layers import Build, KernelReport, kv_specs
from octavo.models import Model, create_model
from octavo.runner import (
    DiskFile,
    KVStorage,
    ModelRunner,
    allocate_kv_caches,
    compile_kernels,
    create_image_store,
    device_facts,
    measure_kv_cache_bytes,
    start_compiler,
    step_limits,
)
from octavo.scheduler import SchedulerSettings, create_scheduler
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
    memory: MemoryReport
    disk: DiskFile | None
    thread: ThreadPoolExecutor | None  # where steps run beside the scheduler, on a CPU
    grammars: LazyGrammars

    def close(self) -> None:
        """End the engine's thread and give its KV file back. Nothing can be asked of it then."""
        if self.thread is not None:
            self.thread.shutdown()
        self.grammars.close()
        if self.disk is not None:
            self.disk.close()


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
    phase = partial(_timed, on_phase)
    with phase("read config"):
        checkpoint = locate(options.model, weights=options.loading.reads_weights)
        model_config = read_model_config(checkpoint, options.loading.model_impl)
        facts = device_facts(options.device.device)
        config = resolve(options, model_config, facts)
        memory = MemoryMeter(config, facts)
    torch.set_num_threads(config.num_threads)
    start_compiler(config)
    with phase("load weights"):
        model = load_model(checkpoint, config)
    with phase("lay out weights for kernels"):
        kernels = lay_out(model, config, registry := create_registry(config))
        memory.weights_are_laid_out(model)
    if config.device == "cuda" and (why := no_graph_because(config, kernels)):
        config = with_eager_steps(config, why)
    elif config.device == "cuda":
        with phase("compile kernels"):
            compile_kernels(model, config)
    with phase("allocate KV cache"):
        if config.kv_cache_bytes is None:
            config = with_kv_cache_bytes(config, measure_kv_cache_bytes(model, config))
            memory.step_was_profiled()
        num_blocks = config.num_device_blocks
        disk = open_disk(checkpoint, config)
        storage = create_storage(model, config, num_blocks, disk)
        grammars = LazyGrammars(checkpoint, config)
        runner = create_runner(model, config, storage, grammars)
        memory.kv_is_allocated(runner, host_kv_bytes=storage.host_bytes)
    if config.device == "cuda" and not config.enforce_eager:
        with phase("capture CUDA graphs"):
            runner.capture_graphs()
    disk_keys = disk.keys() if disk is not None else None
    allocator = create_allocator(config, num_blocks, disk_keys=disk_keys)
    settings = scheduler_settings(config, copy_block_s=storage.measure_copy_s())
    scheduler = create_scheduler(allocator, settings, grammars=grammars)
    load = partial(load_again, checkpoint, config, disk, registry)
    prepare = partial(prepare_again, config, num_blocks, disk, grammars)
    executor = SleepableExecutor(
        model, (runner, storage), device=config.device, load=load, prepare=prepare
    )
    load_first(config, registry)
    launch, thread = create_launch(executor, config)
    create = partial(EngineCore, scheduler, executor, launch=launch, sleeper=executor)
    core = create(adapters=registry, file=disk, check_integrity=check_integrity)
    return BuiltEngine(
        core, checkpoint, config, num_blocks, kernels, memory.report(), disk, thread, grammars
    )


@contextmanager
def _timed(on_phase: PhaseListener, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    on_phase(name, time.perf_counter() - start)


def no_graph_because(config: ResolvedConfig, kernels: Iterable[KernelReport]) -> str | None:
    """Why steps on a GPU cannot be replayed; None where they can."""
    if config.model.is_encoder:
        return "an encoder runs each prompt once, as a whole: there are no decodes to replay"
    if reads_lengths_on_the_host(kernels):
        return "attention runs in plain torch, which no graph can hold"
    return None


def reads_lengths_on_the_host(kernels: Iterable[KernelReport]) -> bool:
    """Whether a step waits for the device halfway, as some references do."""
    waiting = {op.name for op in (PAGED_ATTENTION, LATENT_ATTENTION, MOE_EXPERTS, LORA)}
    return any(
        report.choice.op in waiting and report.choice.name == REFERENCE for report in kernels
    )


def load_model(checkpoint: Checkpoint, config: ResolvedConfig) -> Model:
    """The model with its weights in place, not yet laid out for kernels."""
    if config.model.is_bridged:
        logger.warning(
            "transformers' own modules run %s, with octavo's attention in them: slower than "
            "octavo's own, and without CUDA graphs",
            checkpoint.name,
        )
    dtype = getattr(torch, config.dtype)
    dummy = config.load_format == "dummy"
    # Opened first: a damaged file is refused before anything is allocated for it.
    tensors = None if dummy else read_tensors(checkpoint, config.model, dtype=dtype)
    build = Build(
        config.device,
        dtype,
        config.block_size,
        batch_invariant=config.batch_invariant,
        count_expert_tokens=config.count_expert_tokens,
        kv_groups=config.layer_groups.groups,
    )
    model = create_model(config.model, build, max_positions=config.max_model_len)
    slots = model.slots()
    load_weights(slots, tensors or dummy_tensors(slots, dtype=dtype, device=config.device))
    return model


def load_again(
    checkpoint: Checkpoint,
    config: ResolvedConfig,
    disk: DiskFile | None,
    registry: AdapterRegistry,
) -> Model:
    """The model as its checkpoint is by now, laid out for kernels. KV of other weights is lost."""
    model = load_model(checkpoint, config)
    lay_out(model, config, registry)
    if disk is not None:
        disk.adopt(kv_fingerprint(checkpoint, config))
    return model


def prepare_again(
    config: ResolvedConfig,
    num_blocks: int,
    disk: DiskFile | None,
    grammars: LazyGrammars,
    model: Model,
) -> tuple[ModelRunner, KVStorage]:
    """A runner like the first one, with KV blocks whose contents nobody knows."""
    storage = create_storage(model, config, num_blocks, disk)
    runner = create_runner(model, config, storage, grammars)
    if config.device == "cuda" and not config.enforce_eager:
        runner.capture_graphs()
    return runner, storage


def create_storage(
    model: Model, config: ResolvedConfig, num_blocks: int, disk: DiskFile | None = None
) -> KVStorage:
    """The KV memory of a model, on its device and below."""
    groups = config.layer_groups
    kv_caches = allocate_kv_caches(
        kv_specs(model)[: groups.num_places],
        # What fills a graph's batch up writes to a block that nobody has; holes in tables show it.
        num_blocks=num_blocks + (config.device == "cuda" or not groups.keep_all),
        block_size=config.block_size,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    return KVStorage(
        kv_caches, places=groups.places, num_host_blocks=config.num_host_blocks, disk=disk
    )


def create_runner(
    model: Model,
    config: ResolvedConfig,
    storage: KVStorage,
    grammars: LazyGrammars | None = None,
) -> ModelRunner:
    """The executor of a model."""
    return ModelRunner(
        model,
        storage,
        step_limits(config),
        device=config.device,
        num_threads=config.num_threads,
        grammars=grammars,
        images=create_image_store(model, config),
    )


def create_launch(
    executor: SleepableExecutor, config: ResolvedConfig
) -> tuple[Launch | None, ThreadPoolExecutor | None]:
    """How steps begin ahead of their results, and the thread that runs them where one must."""
    if not config.async_scheduling:
        return None, None
    if config.device == "cuda":
        return executor.launch, None
    thread = ThreadPoolExecutor(1, "octavo-executor")
    return lambda plan: thread.submit(executor.execute, plan), thread


def create_allocator(
    config: ResolvedConfig, num_blocks: int, *, disk_keys: Mapping[int, bytes] | None = None
) -> Allocator:
    """The bookkeeping of the KV memory; `disk_keys` is what lies on disk already."""
    if config.num_host_blocks:
        return TieredAllocator(
            num_blocks,
            config.block_size,
            num_host_blocks=config.num_host_blocks,
            num_disk_blocks=config.num_disk_blocks,
            disk_keys=disk_keys,
        )
    return kvcache.create_allocator(
        config.kv_allocator + ("+prefix" if config.enable_prefix_caching else ""),
        num_blocks,
        config.block_size,
        max_model_len=config.max_model_len,
        groups=config.kv_groups,
    )


def scheduler_settings(
    config: ResolvedConfig, *, copy_block_s: float | None = None
) -> SchedulerSettings:
    """What the options say about scheduling."""
    return SchedulerSettings(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        policy=config.scheduling_policy,
        batching=config.batching,
        preemption_mode=config.preemption_mode,
        whole_prompts=config.model.is_encoder,
        copy_block_s=copy_block_s,
        num_cached_image_tokens=config.num_cached_image_tokens,
        max_num_encoder_tokens=config.max_num_encoder_tokens,
        # Those that could be admitted at once do not really wait.
        max_num_queued_reqs=config.max_num_seqs + config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        target_ttft_ms=config.target_ttft_ms,
        max_loras=0 if config.lora is None else config.lora.max_loras,
    )
