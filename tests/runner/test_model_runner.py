"""Plans through a model whose answers prove positions, slots and block tables."""

import random

import pytest
import torch
from helpers import create_core, create_request, create_scheduler, run_to_end, tokens_of

from octavo.layers import kv_specs
from octavo.runner import KVStorage, ModelRunner, StepLimits, allocate_kv_caches
from octavo.testing.mock_model import MockModel, mock_next_token

VOCAB_SIZE = 997


def create_runner(scheduler):
    model = MockModel(VOCAB_SIZE)
    allocator = scheduler.allocator
    caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=allocator.num_blocks,
        block_size=allocator.block_size,
        dtype=torch.float32,
        device="cpu",
    )
    for cache in caches:
        cache.fill_(float("nan"))  # a slot that is read before it is written shows
    limits = StepLimits(max_num_seqs=6, max_num_batched_tokens=30, max_model_len=256, block_size=4)
    return ModelRunner(model, KVStorage(caches), limits, device="cpu")


def expected_tokens(prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(mock_next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_chunks_decodes_and_preemptions_reads_the_right_slots(seed):
    rng = random.Random(seed)
    scheduler = create_scheduler(
        num_blocks=rng.randint(18, 40),
        max_num_batched_tokens=rng.randint(1, 30),
        max_num_seqs=rng.randint(1, 6),
    )
    core = create_core(scheduler, create_runner(scheduler))
    requests = [
        create_request(rng.randint(1, 40), rng.randint(1, 20), temperature=0) for _ in range(8)
    ]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        assert tokens_of(events, request.request_id) == expected_tokens(
            request.prompt_token_ids, request.sampling.max_tokens
        )
