"""A loaded model on a GPU before it has its KV memory: kernels are compiled, a step is measured."""

import torch

from octavo.config import ResolvedConfig, decode_sizes, mixed_sizes
from octavo.config.memory_plan import graph_overhead_bytes
from octavo.core import NewSequence, SamplingParams, ScheduledTokens, StepPlan
from octavo.errors import ConfigError
from octavo.layers import kv_specs
from octavo.models import Model
from octavo.runner.kv_storage import KVStorage, allocate_kv_caches
from octavo.runner.model_runner import ModelRunner
from octavo.runner.packet import StepSizes
from octavo.runner.rows import step_limits

MIB = 2**20
MOST_TOKENS_OF_SMALL_STEPS = 512  # beyond, all steps run the same kernels


def compile_kernels(model: Model, config: ResolvedConfig) -> None:
    """Have every kernel that steps will run compiled, or loaded from disk, side by side."""
    limits = step_limits(config)
    num_seqs = limits.max_num_seqs
    mixed = mixed_sizes(limits.max_num_batched_tokens)
    num_tokens = {n for n in mixed if n <= MOST_TOKENS_OF_SMALL_STEPS} | {mixed[-1]}
    sizes = [StepSizes(n, n, n) for n in decode_sizes(num_seqs)]
    sizes += [StepSizes(num_seqs, n, num_seqs) for n in sorted(num_tokens)]
    _runner_without_memory(model, config, num_blocks=1).compile_kernels(sizes)


def measure_kv_cache_bytes(model: Model, config: ResolvedConfig) -> int:
    """Bytes left under `gpu_memory_utilization` after weights and the activations of a full step.

    The step has `max_num_batched_tokens` tokens in `max_num_seqs` sequences, all of them sampled.
    CUDA graphs hold as much once more: a step that fits no graph runs beside them.

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
    graphs = 0 if config.enforce_eager else peak - before + graph_overhead_bytes(config)
    left = int(total * config.gpu_memory_utilization) - others - peak - graphs
    # One block is nobody's: what fills a batch up writes there.
    left -= config.kv_block_bytes
    if left < config.kv_block_bytes:
        raise ConfigError(
            f"no memory is left for the KV cache: weights and activations peak at {peak // MIB} "
            f"MiB, CUDA graphs take {graphs // MIB} MiB, others use {others // MIB} MiB, and "
            f"{config.gpu_memory_utilization:.0%} of {total // MIB} MiB may be used; raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens"
        )
    return left


def _run_full_step(model: Model, config: ResolvedConfig) -> None:
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    share, rest = divmod(config.max_num_batched_tokens, num_seqs)
    lengths = [min(share + (i < rest), config.max_model_len) for i in range(num_seqs)]
    num_blocks = -(-max(lengths) // config.block_size)  # shared by all: only sizes matter here
    sampling = SamplingParams(max_tokens=1)
    new = tuple(
        NewSequence(
            sequence_id=f"profile-{i}",
            token_ids=(0,) * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(range(num_blocks)),
            sampling=sampling,
            seed=0,
            stop_ids=frozenset(),
        )
        for i, length in enumerate(lengths)
    )
    shares = tuple(
        ScheduledTokens(one.sequence_id, len(one.token_ids), num_blocks, (), True) for one in new
    )
    runner = _runner_without_memory(model, config, num_blocks=num_blocks)
    runner.execute(StepPlan(0, new, shares, ()))


def _runner_without_memory(model: Model, config: ResolvedConfig, *, num_blocks: int) -> ModelRunner:
    caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    return ModelRunner(
        model,
        KVStorage(caches),
        step_limits(config),
        device=config.device,
        num_threads=config.num_threads,
    )
