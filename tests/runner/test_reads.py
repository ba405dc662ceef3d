"""Scores and vectors out of the runner, eager and in graphs, of a model with known logits."""

import math
import random

import numpy as np
import pytest
import torch
from helpers import create_core, create_request, create_scheduler, run_to_end, tokens_of
from msgspec import structs

from octavo.core import NO_TOKENS, PoolingParams
from octavo.layers import kv_specs
from octavo.runner import KVStorage, ModelRunner, StepLimits, allocate_kv_caches
from octavo.runner.graphs import StepGraphs
from octavo.testing.mock_model import MockModel, mock_next_token

VOCAB_SIZE = 997
LIKELIEST = 1 - math.log(
    math.e + VOCAB_SIZE - 1
)  # of logits that are 1 in one place and 0 elsewhere
OTHER = -math.log(math.e + VOCAB_SIZE - 1)


class RunAgain:
    """Keeps the work's result in one place, as a graph does."""

    def __init__(self, work):
        self._work = work
        self.out = work().clone()

    def run(self):
        self.out.copy_(self._work())


def create_runner(scheduler, limits, *, in_graphs):
    model = MockModel(VOCAB_SIZE)
    caches = allocate_kv_caches(
        kv_specs(model),
        num_blocks=scheduler.allocator.num_blocks + 1,
        block_size=limits.block_size,
        dtype=torch.float32,
        device="cpu",
    )
    runner = ModelRunner(model, KVStorage(caches), limits, device="cpu")
    if in_graphs:
        runner.capture_graphs(lambda: RunAgain)
    for cache in caches:
        cache.fill_(float("nan"))
    return runner


def create_mix(rng, count):
    requests = []
    for _ in range(count):
        # Some prompts go on as the model expects, which the scores of likeliest tokens show.
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        for _ in range(rng.randint(0, 10)):
            expected = mock_next_token(prompt, VOCAB_SIZE)
            prompt.append(expected if rng.random() < 0.5 else rng.randrange(VOCAB_SIZE))
        kind = rng.choice(("plain", "scored", "only scored", "last", "mean"))
        num_top = rng.randint(0, 3) if "scored" in kind else None
        max_tokens = 0 if kind == "only scored" else rng.randint(1, 10)
        request = create_request(
            1, max_tokens, prompt=prompt, temperature=0, prompt_logprobs=num_top
        )
        if kind in ("last", "mean"):
            pooling = PoolingParams(pooling=kind, normalize=False)
            request = structs.replace(request, sampling=NO_TOKENS, pooling=pooling)
        requests.append(request)
    return requests


def check(request, events):
    prompt = request.prompt_token_ids
    follows = [mock_next_token(prompt[: n + 1], VOCAB_SIZE) for n in range(len(prompt))]
    of_one = [event for event in events if event.request_id == request.request_id]
    assert all(event.error is None for event in of_one)
    if request.pooling is not None:
        value = np.mean(follows) if request.pooling.pooling == "mean" else follows[-1]
        [found] = np.frombuffer(of_one[-1].vector, np.float32)
        assert found == pytest.approx(value, rel=1e-6)
        return
    known = list(prompt)
    for token_id in tokens_of(events, request.request_id):
        assert token_id == mock_next_token(known, VOCAB_SIZE)
        known.append(token_id)
    assert len(known) == len(prompt) + request.sampling.max_tokens
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return
    scores = of_one[0].prompt_logprobs
    assert len(scores) == len(prompt) - 1
    for token_id, expected, score in zip(prompt[1:], follows, scores, strict=False):
        is_likeliest = token_id == expected
        assert score.logprob == pytest.approx(LIKELIEST if is_likeliest else OTHER, abs=1e-5)
        assert score.rank == (1 if is_likeliest else 2)
        assert len(score.top) == num_top
        assert [token for token, _ in score.top[:1]] == [expected][:num_top]


@pytest.mark.parametrize("in_graphs", [False, True], ids=("eager", "in graphs"))
@pytest.mark.parametrize("seed", range(15))
def test_any_mix_of_readers_and_draws_gets_its_own_hidden_states(seed, in_graphs):
    rng = random.Random(seed)
    limits = StepLimits(
        max_num_seqs=rng.randint(1, 21),
        max_num_batched_tokens=rng.randint(21, 60),
        max_model_len=256,
        block_size=4,
        num_scored_at_once=rng.randint(1, 9),
    )
    scheduler = create_scheduler(
        num_blocks=rng.randint(18, 60),
        max_num_batched_tokens=rng.choice((1, 5, limits.max_num_batched_tokens)),
        max_num_seqs=limits.max_num_seqs,
        prefix_caching=rng.random() < 0.5,
    )
    runner = create_runner(scheduler, limits, in_graphs=in_graphs)
    core = create_core(scheduler, runner)
    requests = create_mix(rng, 25)
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        check(request, events)
    core.add(create_request())
    run_to_end(core)  # its plan tells the runner of the last that were dropped
    assert not runner._rows.readers


def test_a_prompt_that_is_scored_costs_later_steps_nothing():
    scheduler = create_scheduler(max_num_batched_tokens=16)
    runner = create_runner(scheduler, StepLimits(8, 16, 256, 4), in_graphs=False)
    core = create_core(scheduler, runner)
    core.add(create_request(20, 10, prompt_logprobs=0))
    assert core.step() == []
    assert len(runner._rows.readers) == 1
    [event] = core.step()
    assert len(event.prompt_logprobs) == 19
    assert core.has_work and not runner._rows.readers


def test_steps_that_read_few_hidden_states_are_graphs(monkeypatch):
    limits = StepLimits(8, 64, 256, 4)
    scheduler = create_scheduler(max_num_batched_tokens=64)
    core = create_core(scheduler, create_runner(scheduler, limits, in_graphs=True))
    shapes = []
    run_model = StepGraphs.run_model

    def spy(self, shape):
        shapes.append(shape)
        return run_model(self, shape)

    monkeypatch.setattr(StepGraphs, "run_model", spy)
    for kind, num_in_graphs in (("last", 1), ("mean", 0)):
        pooling = PoolingParams(pooling=kind)
        shapes.clear()
        core.add(structs.replace(create_request(20), sampling=NO_TOKENS, pooling=pooling))
        run_to_end(core)
        assert len(shapes) == num_in_graphs
