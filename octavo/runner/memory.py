"""How much KV memory a GPU has left for a loaded model: measured, not guessed."""

import torch

from octavo.config import ResolvedConfig
from octavo.core import NewSequence, SamplingParams, ScheduledTokens, StepPlan
from octavo.errors import ConfigError
from octavo.layers import kv_specs
from octavo.models import Model
from octavo.runner.kv_storage import KVStorage, allocate_kv_caches
from octavo.runner.model_runner import ModelRunner

MIB = 2**20


def measure_kv_cache_bytes(model: Model, config: ResolvedConfig) -> int:
    """Bytes left under `gpu_memory_utilization` after weights and the activations of a full step.

    The step has `max_num_batched_tokens` tokens in `max_num_seqs` sequences, all of them sampled.

    Raises:
        ConfigError: nothing is left.
    """
    torch.cuda.reset_peak_memory_stats()
    _run_full_step(model, config)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    left = int(total * config.gpu_memory_utilization) - others - peak
    if left < config.kv_block_bytes:
        raise ConfigError(
            f"no memory is left for the KV cache: weights and activations peak at {peak // MIB} "
            f"MiB, others use {others // MIB} MiB, and {config.gpu_memory_utilization:.0%} of "
            f"{total // MIB} MiB may be used; raise gpu_memory_utilization, or lower "
            "max_num_batched_tokens"
        )
    return left


def _run_full_step(model: Model, config: ResolvedConfig) -> None:
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    num_tokens = config.max_num_batched_tokens // num_seqs
    num_blocks = -(-num_tokens // config.block_size)  # shared by all: only sizes matter here
    caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    sampling = SamplingParams(max_tokens=1)
    names = [f"profile-{i}" for i in range(num_seqs)]
    new = tuple(
        NewSequence(
            sequence_id=name,
            token_ids=(0,) * num_tokens,
            num_prompt_tokens=num_tokens,
            num_computed_tokens=0,
            block_ids=tuple(range(num_blocks)),
            sampling=sampling,
            seed=0,
            stop_ids=frozenset(),
        )
        for name in names
    )
    shares = tuple(ScheduledTokens(name, num_tokens, num_blocks, (), True) for name in names)
    runner = ModelRunner(
        model, KVStorage(caches), block_size=config.block_size, device=config.device
    )
    runner.execute(StepPlan(0, new, shares, ()))
