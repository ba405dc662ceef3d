"""Scores and vectors of prompts on a fake executor, whose answers give away every wrong token."""

import random

import pytest
from helpers import (
    VOCAB_SIZE,
    create_core,
    create_executor,
    create_request,
    create_scheduler,
    run_to_end,
    tokens_of,
)
from msgspec import structs

from octavo.core import NO_TOKENS, FinishReason, PoolingParams
from octavo.engine import EngineCore
from octavo.sim.fake_executor import oracle_score, oracle_tokens, oracle_vector


def create_pooling(num_tokens, pooling, **changes):
    request = create_request(num_tokens, 1, **changes)
    return structs.replace(request, sampling=NO_TOKENS, pooling=PoolingParams(pooling=pooling))


def expected_scores(prompt, num_top):
    return tuple(oracle_score(prompt[:n], num_top, VOCAB_SIZE) for n in range(2, len(prompt) + 1))


def last_of(events, request):
    *_, last = (event for event in events if event.request_id == request.request_id)
    return last


def create_mix(rng, count):
    """Requests of all kinds, some of which begin alike."""
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    requests = []
    for _ in range(count):
        cut = rng.randint(0, 30)
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        prompt = shared[:cut] + own
        kind = rng.choice(("plain", "scored", "only scored", "last", "mean"))
        if kind in ("last", "mean"):
            requests.append(create_pooling(1, kind, prompt=prompt))
            continue
        max_tokens = 0 if kind == "only scored" else rng.randint(1, 12)
        num_top = None if kind == "plain" else rng.randint(0, 4)
        requests.append(create_request(1, max_tokens, prompt=prompt, prompt_logprobs=num_top))
    return requests


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_chunks_preemptions_and_caches_change_neither_scores_nor_vectors(
    seed, asynchronous, prefix_caching
):
    rng = random.Random(seed)
    scheduler = create_scheduler(
        num_blocks=rng.randint(16, 30),
        max_num_batched_tokens=rng.randint(1, 30),
        max_num_seqs=rng.randint(1, 8),
        prefix_caching=prefix_caching,
    )
    core = create_core(scheduler, asynchronous=asynchronous)
    requests = create_mix(rng, 24)
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        prompt, sampling = request.prompt_token_ids, request.sampling
        of_one = [event for event in events if event.request_id == request.request_id]
        assert [e.finish_reason for e in of_one[:-1]] == [None] * (len(of_one) - 1)
        expected = oracle_tokens(prompt, sampling.max_tokens, VOCAB_SIZE)
        assert tokens_of(events, request.request_id) == expected
        told = [event.prompt_logprobs for event in of_one]
        scores = None
        if sampling.prompt_logprobs is not None:
            scores = expected_scores(prompt, sampling.prompt_logprobs)
        assert told == [scores] + [None] * (len(of_one) - 1)
        if request.pooling is not None:
            assert (of_one[-1].vector, len(of_one)) == (oracle_vector(prompt), 1)
            assert of_one[-1].finish_reason is FinishReason.STOP
        else:
            assert of_one[-1].finish_reason is FinishReason.LENGTH


def test_the_mix_does_preempt():
    scheduler = create_scheduler(num_blocks=14, max_num_batched_tokens=9)
    core = create_core(scheduler, asynchronous=True)
    for request in create_mix(random.Random(0), 24):
        core.add(request)
    run_to_end(core)
    assert core.stats().num_preemptions > 0


@pytest.mark.parametrize(
    ("pooling", "num_cached"), [("last", 16), ("mean", 0)], ids=("last", "mean")
)
def test_a_mean_reads_no_cache_and_fills_it(pooling, num_cached):
    core = create_core(create_scheduler(prefix_caching=True))
    first, second = (create_pooling(20, pooling) for _ in range(2))
    for request in (first, second):
        core.add(request)
        [event] = run_to_end(core)
        assert event.vector == oracle_vector(request.prompt_token_ids)
    assert event.num_cached_tokens == num_cached
    core.add(create_request(20, 1))
    [event] = run_to_end(core)
    assert event.num_cached_tokens == 16


def test_siblings_share_what_the_scored_one_computed():
    core = create_core(create_scheduler())
    scored = create_request(20, 3, prompt_logprobs=2)
    others = [
        structs.replace(
            scored,
            request_id=f"other-{i}",
            sampling=structs.replace(scored.sampling, prompt_logprobs=None),
        )
        for i in range(2)
    ]
    core.add(scored, *others)
    events = run_to_end(core)
    expected = oracle_tokens(scored.prompt_token_ids, 3, VOCAB_SIZE)
    for request in (scored, *others):
        assert tokens_of(events, request.request_id) == expected
    assert core.stats().num_prompt_tokens <= 20 + 2  # a fork computes its last token at most
    firsts = {e.request_id: e for e in reversed(events)}
    assert firsts[scored.request_id].prompt_logprobs == expected_scores(scored.prompt_token_ids, 2)
    assert firsts["other-0"].prompt_logprobs is None


@pytest.mark.parametrize("kind", ["last", "mean", "scored"])
def test_what_is_not_finite_fails_that_request_alone_and_is_not_found_again(kind):
    scheduler = create_scheduler(max_num_batched_tokens=12, prefix_caching=True)
    executor = create_executor(scheduler)
    core = EngineCore(scheduler, executor, check_integrity=True)
    is_scored = kind == "scored"
    bad = create_request(20, 2, prompt_logprobs=1) if is_scored else create_pooling(20, kind)
    core.add(bad)
    assert core.step() == []
    executor.poison(bad.request_id, 2)
    good = create_request(9, 2, prompt=list(range(9)), prompt_logprobs=1)
    core.add(good)
    events = run_to_end(core)
    assert "not finite" in last_of(events, bad).error
    assert [e for e in events if e.request_id == bad.request_id] == [last_of(events, bad)]
    assert last_of(events, good).finish_reason is FinishReason.LENGTH
    again = create_pooling(20, "last")
    core.add(again)
    [event] = run_to_end(core)
    assert (event.vector, event.num_cached_tokens) == (oracle_vector(again.prompt_token_ids), 0)


def test_an_aborted_embedding_leaves_nothing():
    scheduler = create_scheduler(max_num_batched_tokens=8)
    core = create_core(scheduler)
    request = create_pooling(30, "mean")
    core.add(request)
    core.step()
    [event] = core.abort([request.request_id])
    assert (event.finish_reason, event.vector) == (FinishReason.ABORT, b"")
    assert not core.has_work
    assert scheduler.allocator.num_free_blocks == scheduler.allocator.num_blocks
