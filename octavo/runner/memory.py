"""A loaded model on a GPU before it has its KV memory: kernels are compiled, a step is measured."""

import torch

from octavo.config import ResolvedConfig, decode_sizes, mixed_sizes
from octavo.config.memory_plan import most_graph_bytes
from octavo.core import NewSequence, SamplingParams, ScheduledTokens, StepPlan
from octavo.errors import ConfigError
from octavo.kernels import Case, triton_support
from octavo.layers import kv_specs
from octavo.models import Model
from octavo.runner.images import ImageStore, create_image_store, largest_pictures
from octavo.runner.kv_storage import KVStorage, allocate_kv_caches
from octavo.runner.model_runner import ModelRunner
from octavo.runner.packet import StepSizes
from octavo.runner.rows import step_limits

MIB = 2**20


def start_compiler(config: ResolvedConfig) -> None:
    """On a GPU, have a thread ready what `compile_kernels` will use; returns at once."""
    if triton_support.unsupported(Case(config.device, getattr(torch, config.dtype))) is None:
        from octavo.kernels import triton_launch  # there is no Triton elsewhere

        triton_launch.start_compiler()


def compile_kernels(model: Model, config: ResolvedConfig) -> None:
    """Have every kernel that steps will run compiled, or loaded from disk, side by side."""
    limits = step_limits(config)
    num_seqs = limits.max_num_seqs
    # Large steps come first: they run the kernels that take longest to compile.
    mixed = _one_of_each_kind(mixed_sizes(limits.max_num_batched_tokens))
    sizes = [StepSizes(num_seqs, n, num_seqs) for n in mixed]
    sizes += [StepSizes(n, n, n) for n in _one_of_each_kind(decode_sizes(num_seqs))]
    runner = _runner_without_memory(model.with_few_blocks(), config, num_blocks=1)
    runner.compile_kernels(sizes)


def _one_of_each_kind(sizes: list[int]) -> list[int]:
    """Some of these ascending sizes, the largest first, that run all the kernels of all of them.

    Whatever launches a kernel changes its choice at powers of two only. What it may not know of
    them is compiled when it is first launched.
    """
    largest = {(size - 1).bit_length(): size for size in sizes}
    return sorted(largest.values(), reverse=True)


def measure_kv_cache_bytes(model: Model, config: ResolvedConfig) -> int:
    """Bytes left under `gpu_memory_utilization` after weights and the activations of a full step.

    The step has `max_num_batched_tokens` tokens in `max_num_seqs` sequences, all of them sampled.
    CUDA graphs hold theirs beside it, for steps that fit no graph. A model that
    sees encodes as many images as a step may, too, and has the memory for rows of images.

    Raises:
        ConfigError: nothing is left.
    """
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run_full_step(model, config)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    graphs = 0 if config.enforce_eager else most_graph_bytes(config, peak - before)
    peak = max(peak, _encoding_peak(model, config))
    left = int(total * config.gpu_memory_utilization) - others - peak - graphs
    # One block is nobody's: what fills a batch up writes there.
    left -= config.kv_block_bytes
    if config.model.vision is not None:
        left -= config.encoder_cache_bytes
    if left < config.kv_block_bytes:
        raise ConfigError(
            f"no memory is left for the KV cache: weights and activations peak at {peak // MIB} "
            f"MiB, CUDA graphs take {graphs // MIB} MiB, others use {others // MIB} MiB, and "
            f"{config.gpu_memory_utilization:.0%} of {total // MIB} MiB may be used; raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens"
        )
    return left


def _encoding_peak(model: Model, config: ResolvedConfig) -> int:
    """Bytes at the peak of the largest step of an encoder; 0 where there is none."""
    store = create_image_store(model, config)
    if store is None:
        return 0
    torch.cuda.reset_peak_memory_stats()
    encode_largest(store, config)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del store
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def encode_largest(store: ImageStore, config: ResolvedConfig) -> None:
    """Have a store encode as much as one step may."""
    store.update(StepPlan(0, (), (), (), pictures=largest_pictures(config)))


def _run_full_step(model: Model, config: ResolvedConfig) -> None:
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    share, rest = divmod(config.max_num_batched_tokens, num_seqs)
    lengths = [min(share + (i < rest), config.max_model_len) for i in range(num_seqs)]
    num_blocks = -(-max(lengths) // config.block_size)  # shared by all: only sizes matter here
    table = tuple(range(num_blocks)) * config.kv_groups.num_groups
    sampling = SamplingParams(max_tokens=1)
    new = tuple(
        NewSequence(
            sequence_id=f"profile-{i}",
            token_ids=(0,) * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=table,
            sampling=sampling,
            seed=0,
            stop_ids=frozenset(),
        )
        for i, length in enumerate(lengths)
    )
    shares = tuple(
        ScheduledTokens(one.sequence_id, len(one.token_ids), len(table), (), True) for one in new
    )
    runner = _runner_without_memory(model, config, num_blocks=num_blocks)
    runner.execute(StepPlan(0, new, shares, ()))


def _runner_without_memory(model: Model, config: ResolvedConfig, *, num_blocks: int) -> ModelRunner:
    groups = config.layer_groups
    caches = allocate_kv_caches(
        kv_specs(model)[: groups.num_places],
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    return ModelRunner(
        model,
        KVStorage(caches, places=groups.places),
        step_limits(config),
        device=config.device,
        num_threads=config.num_threads,
    )
