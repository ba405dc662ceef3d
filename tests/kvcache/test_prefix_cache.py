"""The prefix cache: what is shared, what never is, what goes first, and that no text changes."""

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

from octavo.core import FinishReason, RequestOptions
from octavo.kvcache import BlockPool
from octavo.kvcache.prefix import block_key, chain_root
from octavo.sim import oracle_tokens

PREFIX = [(13 * i + 5) % VOCAB_SIZE for i in range(30)]


def run(core, request):
    core.add(request)
    events = run_to_end(core)
    expected = oracle_tokens(request.prompt_token_ids, request.sampling.max_tokens, VOCAB_SIZE)
    assert tokens_of(events, request.request_id) == expected
    return next(e for e in events if e.request_id == request.request_id).num_cached_tokens


@pytest.fixture
def core():
    return create_core(create_scheduler(prefix_caching=True, num_blocks=64))


def test_a_repeated_beginning_is_found_in_full_blocks(core):
    assert run(core, create_request(prompt=PREFIX + [1, 2, 3])) == 0
    assert run(core, create_request(prompt=PREFIX + [4, 5])) == 28  # 7 blocks of 4 of 30 tokens
    assert run(core, create_request(prompt=PREFIX[:10] + [9] * 10)) == 8
    assert run(core, create_request(prompt=[0] + PREFIX)) == 0
    stats = core.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (33 + 32 + 20 + 31, 36)


def test_the_last_token_of_a_prompt_is_always_computed(core):
    prompt = PREFIX[:28]
    assert run(core, create_request(prompt=prompt)) == 0
    assert run(core, create_request(prompt=prompt)) == 24


def test_answers_are_found_too_when_a_conversation_goes_on(core):
    first = create_request(prompt=PREFIX, max_tokens=10)
    run(core, first)
    answer = oracle_tokens(PREFIX, 10, VOCAB_SIZE)
    # 39 of the 40 tokens were computed: the last one sampled never is.
    assert run(core, create_request(prompt=PREFIX + answer + [7])) == 36


def test_salts_keep_tenants_apart(core):
    assert run(core, create_request(prompt=PREFIX, options=RequestOptions(cache_salt="a"))) == 0
    assert run(core, create_request(prompt=PREFIX, options=RequestOptions(cache_salt="b"))) == 0
    assert run(core, create_request(prompt=PREFIX)) == 0
    assert run(core, create_request(prompt=PREFIX, options=RequestOptions(cache_salt="a"))) == 28


def test_running_requests_share_blocks_and_the_last_one_frees_them():
    scheduler = create_scheduler(prefix_caching=True, num_blocks=16)
    executor = create_executor(scheduler)

    def step():
        plan = scheduler.schedule()
        scheduler.commit(plan, executor.execute(plan))
        scheduler.check_integrity()

    first = create_request(prompt=PREFIX[:13], max_tokens=9)
    second = create_request(prompt=PREFIX[:13], max_tokens=3)
    scheduler.add(first)
    step()
    held_by_one = 16 - scheduler.stats().num_free_blocks
    scheduler.add(second)
    step()
    assert 16 - scheduler.stats().num_free_blocks == held_by_one + 1
    while scheduler.has_work:
        step()
    assert scheduler.stats().num_free_blocks == 16


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end():
    core = create_core(create_scheduler(prefix_caching=True, num_blocks=12, block_size=4))
    old, new = PREFIX[:17], [7] + PREFIX[:16]
    run(core, create_request(prompt=old, max_tokens=1))
    run(core, create_request(prompt=new, max_tokens=1))
    run(core, create_request(prompt=[9] * 22, max_tokens=1))  # 6 blocks; 4 were never used
    assert run(core, create_request(prompt=new, max_tokens=1)) == 16
    assert run(core, create_request(prompt=old, max_tokens=1)) == 8  # its last two blocks went


def test_blocks_of_a_chunk_that_was_not_finite_are_not_found():
    scheduler = create_scheduler(prefix_caching=True, max_num_batched_tokens=8)
    executor = create_executor(scheduler)
    core = create_core(scheduler, executor)
    first = create_request(prompt=PREFIX[:17], max_tokens=2)
    core.add(first)
    core.step()
    executor.poison(first.request_id, 4)  # known only when the last chunk is sampled
    assert [e.finish_reason for e in run_to_end(core)] == [FinishReason.ERROR]
    again = create_request(prompt=PREFIX[:17], max_tokens=2)
    core.add(again)
    events = run_to_end(core)
    assert tokens_of(events, again.request_id) == oracle_tokens(PREFIX[:17], 2, VOCAB_SIZE)


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler = create_scheduler(prefix_caching=True, num_blocks=10, max_num_batched_tokens=64)
    core = create_core(scheduler)
    requests = [create_request(prompt=[i] * 12, max_tokens=16) for i in range(3)]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    assert scheduler.stats().num_preemptions > 0
    for request in requests:
        expected = oracle_tokens(request.prompt_token_ids, 16, VOCAB_SIZE)
        assert tokens_of(events, request.request_id) == expected


def test_keys_depend_on_everything_before_and_on_the_extras():
    root = chain_root(())
    assert block_key(root, [1, 2]) != block_key(root, [2, 1])
    assert block_key(block_key(root, [1]), [2]) != block_key(block_key(root, [3]), [2])
    assert chain_root(("ab", "c")) != chain_root(("a", "bc")) != chain_root(())


def test_the_pool_gives_out_what_nobody_looks_for_before_what_somebody_might():
    pool = BlockPool(4)
    taken = pool.take(3)
    pool.name(taken[0], b"x")
    pool.give_back(taken)
    assert pool.take(3) != [] and pool.find(b"x") == taken[0]
    assert pool.take(1) == [taken[0]] and pool.find(b"x") is None
    assert pool.num_evictions == 1
