"""Steps that are filled up to a graph's size, on a CPU: the work is run again in place of a replay.

What a real CUDA graph adds is tested on a GPU.
"""

import random

import pytest
import torch
from helpers import create_core, create_request, create_scheduler, run_to_end, tokens_of

from octavo.config import decode_sizes, mixed_sizes
from octavo.layers import kv_specs
from octavo.runner import KVStorage, ModelRunner, StepLimits, allocate_kv_caches
from octavo.testing.mock_model import MockModel, mock_next_token

VOCAB_SIZE = 997


def expected_tokens(prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(mock_next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


class RunAgain:
    """Keeps the work's result in one place, as a graph does."""

    def __init__(self, work):
        self._work = work
        self.out = work().clone()

    def run(self):
        self.out.copy_(self._work())


def create_runner(scheduler, limits):
    model = MockModel(VOCAB_SIZE)
    caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=scheduler.allocator.num_blocks + 1,
        block_size=limits.block_size,
        dtype=torch.float32,
        device="cpu",
    )
    runner = ModelRunner(model, KVStorage(caches), limits, device="cpu")
    runner.capture_graphs(lambda: RunAgain)
    for cache in caches:
        cache.fill_(float("nan"))
    return runner


@pytest.mark.parametrize("seed", range(20))
def test_what_fills_a_step_up_changes_no_token(seed):
    rng = random.Random(seed)
    limits = StepLimits(
        max_num_seqs=rng.randint(1, 21),
        max_num_batched_tokens=rng.randint(21, 90),
        max_model_len=256,
        block_size=4,
    )
    scheduler = create_scheduler(
        num_blocks=rng.randint(18, 60),
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
    )
    core = create_core(scheduler, create_runner(scheduler, limits))
    requests = [
        create_request(
            rng.randint(1, 40),
            rng.randint(1, 20),
            **({"temperature": 0} if rng.random() < 0.7 else {"top_k": 1, "seed": 1}),
        )
        for _ in range(30)
    ]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        assert tokens_of(events, request.request_id) == expected_tokens(
            request.prompt_token_ids, request.sampling.max_tokens
        )


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 11, 250, 256, 300, 1000])
def test_there_is_a_graph_for_every_decode_up_to_the_limit(limit):
    sizes = decode_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit
    for number in range(1, limit + 1):
        size = min(size for size in sizes if size >= number)
        assert size - number < max(2, 16 if number > 256 else 8, 1) and size <= 2 * number + 2


@pytest.mark.parametrize("limit", [1, 63, 64, 1000, 1024, 5000, 8192, 20_000])
def test_a_mixed_step_is_filled_up_by_little(limit):
    sizes = mixed_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit and len(sizes) < 80
    for number in range(1, limit + 1):
        size = min(size for size in sizes if size >= number)
        assert size - number < 64 or (size - number) / number <= 0.125
