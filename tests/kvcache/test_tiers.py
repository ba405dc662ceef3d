"""KV below the device: what is evicted comes back, what is swapped is not lost, nothing leaks."""

import pytest
from helpers import VOCAB_SIZE, create_core, create_request, run_to_end, tokens_of

from octavo.core import Tier
from octavo.errors import IntegrityError
from octavo.kvcache import TieredAllocator
from octavo.scheduler import (
    Blocks,
    Preemption,
    PrefillSpeed,
    Scheduler,
    SequenceSlots,
    TokenBudget,
    TransferSpeed,
)
from octavo.sim import FakeExecutor, VirtualClock
from octavo.sim.fake_executor import oracle_tokens

BLOCK_SIZE = 4


def create_engine(
    *, num_blocks=8, num_host_blocks=8, num_disk_blocks=0, preemption=None, disk_keys=None
):
    allocator = TieredAllocator(
        num_blocks,
        BLOCK_SIZE,
        num_host_blocks=num_host_blocks,
        num_disk_blocks=num_disk_blocks,
        disk_keys=disk_keys,
    )
    scheduler = Scheduler(
        allocator,
        [TokenBudget(64), SequenceSlots(8), Blocks(allocator)],
        max_model_len=256,
        preemption=preemption,
        clock=VirtualClock(),
    )
    executor = FakeExecutor(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
        num_host_blocks=num_host_blocks,
        num_disk_blocks=num_disk_blocks,
    )
    return scheduler, executor, create_core(scheduler, executor)


def run(core, prompt, max_tokens=2):
    """Tokens found in the cache; the text is checked on the way."""
    request = create_request(prompt=prompt, max_tokens=max_tokens)
    core.add(request)
    events = run_to_end(core)
    expected = oracle_tokens(prompt, max_tokens, VOCAB_SIZE)
    assert tokens_of(events, request.request_id) == expected
    return max(event.num_cached_tokens for event in events)


def prompt_of(number, num_tokens=17):
    return [number] * num_tokens


def test_an_evicted_prefix_comes_back_from_the_host():
    _, _, core = create_engine(num_blocks=8, num_host_blocks=8)
    assert run(core, prompt_of(1)) == 0
    assert run(core, prompt_of(2)) == 0  # takes the place of the first on the device
    assert run(core, prompt_of(1)) == 16
    assert run(core, prompt_of(2)) == 16


def test_what_the_host_evicts_comes_back_from_the_disk():
    _, _, core = create_engine(num_blocks=8, num_host_blocks=4, num_disk_blocks=64)
    for number in range(6):
        run(core, prompt_of(number))
    assert [run(core, prompt_of(number)) for number in range(6)] == [16] * 6


@pytest.mark.parametrize("num_disk_blocks", [0, 3])
def test_every_tier_is_bounded_and_the_least_recently_used_goes_first(num_disk_blocks):
    _, _, core = create_engine(num_blocks=8, num_host_blocks=4, num_disk_blocks=num_disk_blocks)
    for number in range(20):
        run(core, prompt_of(number))
    assert run(core, prompt_of(19)) == 16
    assert run(core, prompt_of(0)) == 0


def three_that_do_not_fit(core):
    requests = [create_request(prompt=prompt_of(n, 9), max_tokens=12) for n in range(3)]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        expected = oracle_tokens(request.prompt_token_ids, 12, VOCAB_SIZE)
        assert tokens_of(events, request.request_id) == expected
    return requests


@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
def test_no_way_of_preempting_changes_the_text(mode):
    scheduler, _, core = create_engine(
        num_blocks=9, num_host_blocks=32, preemption=Preemption(mode)
    )
    three_that_do_not_fit(core)
    assert scheduler.stats().num_preemptions > 0


def computed_tokens(mode, **speeds):
    preemption = Preemption(
        mode,
        transfers=TransferSpeed(speeds.get("block_s")),
        prefills=prefill_speed(speeds.get("tokens_per_s")),
    )
    scheduler, _, core = create_engine(num_blocks=9, num_host_blocks=32, preemption=preemption)
    scheduler.allocator._pool.forget_all()
    num_computed = 0
    execute = core._executor.execute

    def counting(plan):
        nonlocal num_computed
        num_computed += plan.num_tokens
        scheduler.allocator._pool.forget_all()  # so that only swapping saves anything
        return execute(plan)

    core._executor.execute = counting
    three_that_do_not_fit(core)
    return num_computed


def prefill_speed(tokens_per_s):
    speed = PrefillSpeed()
    speed.tokens_per_s = tokens_per_s
    return speed


def test_swapping_computes_every_token_once_and_recomputing_more():
    assert computed_tokens("swap") == 3 * (9 + 12 - 1)
    assert computed_tokens("recompute") > computed_tokens("swap")


def test_the_cost_model_picks_what_is_cheaper():
    cheap_copies = computed_tokens("auto", block_s=1e-6, tokens_per_s=100.0)
    cheap_tokens = computed_tokens("auto", block_s=1.0, tokens_per_s=1e9)
    assert cheap_copies == computed_tokens("swap")
    assert cheap_tokens == computed_tokens("recompute")


def test_without_room_on_the_host_a_preempted_request_is_computed_again():
    scheduler, _, core = create_engine(
        num_blocks=9, num_host_blocks=1, preemption=Preemption("swap")
    )
    three_that_do_not_fit(core)
    assert scheduler.stats().num_preemptions > 0


def test_a_swapped_request_that_is_aborted_gives_its_host_memory_back():
    scheduler, _, core = create_engine(
        num_blocks=9, num_host_blocks=32, preemption=Preemption("swap")
    )
    for n in range(3):
        core.add(create_request(prompt=prompt_of(n, 9), max_tokens=20, request_id=f"r{n}"))
    while not scheduler.allocator._swapped:
        core.step()
    host = scheduler.allocator._host.pool
    assert host.num_free < host.num_blocks
    core.abort(["r0", "r1", "r2"])
    assert host.num_free == host.num_blocks
    scheduler.check_integrity()


def test_a_block_that_did_not_arrive_is_computed_again():
    scheduler, executor, core = create_engine()
    run(core, prompt_of(1))
    run(core, prompt_of(2))
    execute, failed = executor.execute, []

    def losing_one_block(plan):
        loads = [i for i, t in enumerate(plan.transfers) if t.target_tier is Tier.DEVICE]
        if loads and not failed:
            failed.append(loads[0])
            executor.fail_transfer(loads[0])
        return execute(plan)

    executor.execute = losing_one_block
    assert run(core, prompt_of(1)) == 16  # believed at first
    assert scheduler.stats().num_preemptions == 1
    assert run(core, prompt_of(1)) == 16


def test_disk_contents_outlive_the_engine():
    before, executor, core = create_engine(num_blocks=8, num_host_blocks=4, num_disk_blocks=64)
    for number in range(4):
        run(core, prompt_of(number))
    disk = before.allocator._stores[Tier.DISK].pool
    keys = {block: key for block in range(64) if (key := disk.key_of(block)) is not None}
    after, survivor, core = create_engine(
        num_blocks=8, num_host_blocks=4, num_disk_blocks=64, disk_keys=keys
    )
    survivor._tokens[Tier.DISK][:] = executor._tokens[Tier.DISK]
    survivor._positions[Tier.DISK][:] = executor._positions[Tier.DISK]
    assert run(core, prompt_of(0)) == 16
    after.check_integrity()


def test_integrity_notices_a_leaked_host_block():
    scheduler, _, core = create_engine()
    run(core, prompt_of(1))
    scheduler.allocator._host.pool.take(1)
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()
