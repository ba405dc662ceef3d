"""The count of slots by category, against a count slot by slot."""

import random

import pytest
from helpers import create_request

from octavo.core import Fork, Sequence
from octavo.errors import IntegrityError
from octavo.kvcache import (
    ALLOCATORS,
    BuddyAllocator,
    ContiguousAllocator,
    MemoryUse,
    PagedAllocator,
    PrefixAllocator,
    create_allocator,
    measure_memory,
)


def give(allocator, num_tokens, num_computed, num_prompt_tokens=5, max_tokens=8):
    """A sequence with room for `num_tokens`, of which some are computed."""
    request = create_request(num_prompt_tokens, max_tokens)
    sequence = Sequence(request, max_tokens, arrival_s=0.0)
    allocator.start(sequence)
    allocator.extend(sequence, num_tokens)
    sequence.num_computed_tokens = num_computed
    return sequence


def naive(allocator, live, end):
    """Used, reserved and internal, each slot looked at on its own."""
    slots = {}
    for sequence in live:
        for position in range(len(sequence.block_ids) * allocator.block_size):
            index, offset = divmod(position, allocator.block_size)
            slot = (sequence.block_ids[index], offset)
            if position < sequence.num_computed_tokens:
                state = "used"
            else:
                state = "reserved" if position < end(sequence) else "internal"
            order = ("internal", "reserved", "used")
            slots[slot] = max(slots.get(slot, "internal"), state, key=order.index)
    states = list(slots.values())
    return tuple(states.count(state) for state in ("used", "reserved", "internal"))


def test_the_categories_of_the_papers_figure_3():
    """Runs of 8 blocks of 4: 3 slots computed, 12 wanted at most, 7 needed in truth."""
    allocator = ContiguousAllocator(20, 4, max_model_len=33)
    sequence = give(allocator, 5, 3)
    other = give(allocator, 5, 5)
    use = measure_memory(allocator, [sequence, other])
    assert use == MemoryUse(3 + 5, 9 + 7, 20 + 20, 0, 16)
    known = measure_memory(allocator, [sequence, other], end=lambda s: 7)
    assert known == MemoryUse(3 + 5, 4 + 2, 25 + 25, 0, 16)
    # Four blocks are left, and a third sequence wants eight.
    wish = Sequence(create_request(), 4, arrival_s=0.0)
    scarce = measure_memory(allocator, [sequence, other], wish=wish)
    assert scarce == MemoryUse(3 + 5, 9 + 7, 20 + 20, 16, 0)
    assert scarce.num_slots == 80 and scarce.num_given_slots == 64


def test_pages_waste_at_most_the_end_of_a_block():
    allocator = PagedAllocator(20, 4)
    wish = Sequence(create_request(40, 60), 60, arrival_s=0.0)
    sequence = give(allocator, 6, 6)
    use = measure_memory(allocator, [sequence], wish=wish)
    assert use == MemoryUse(6, 2, 0, 0, 72)  # the wish is too long, but nothing lies awkwardly
    assert measure_memory(allocator, [sequence], end=lambda s: 7) == MemoryUse(6, 1, 1, 0, 72)


def test_external_fragmentation_is_what_lies_in_runs_too_short():
    allocator = BuddyAllocator(8, 4)
    sequences = [give(allocator, 5, 5, 5, 4) for _ in range(4)]  # two blocks each
    allocator.free(sequences[0])
    allocator.free(sequences[2])
    live = [sequences[1], sequences[3]]
    short, long = (Sequence(create_request(5, n), n, arrival_s=0.0) for n in (4, 8))
    assert measure_memory(allocator, live, wish=short).num_external_slots == 0
    assert measure_memory(allocator, live, wish=long).num_external_slots == 16
    assert measure_memory(allocator, live, wish=long).num_free_slots == 0


def test_shared_blocks_count_once():
    allocator = PrefixAllocator(20, 4)
    first = give(allocator, 10, 10, 10, 4)
    first.num_committed_tokens = 10
    allocator.computed(first)
    second = Sequence(first.request, 4, arrival_s=0.0)
    assert allocator.start(second) == 8
    second.num_computed_tokens = 8
    allocator.extend(second, 10)
    use = measure_memory(allocator, [first, second])
    # Two blocks are shared; the first has 2 tokens and 2 slots in a third, the second 4 slots.
    assert use == MemoryUse(8 + 2, 2 + 4, 0, 0, 64)
    assert measure_memory(allocator, [second, first]) == use


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_slot_is_in_one_category(name):
    rng = random.Random(name)
    for _ in range(50):
        block_size = rng.choice([1, 3, 4, 16])
        allocator = create_allocator(name, 60, block_size, max_model_len=8 * block_size)
        live, ends = [], {}
        for _ in range(rng.randrange(8)):
            num_prompt = rng.randint(1, 4 * block_size)
            max_tokens = rng.randint(1, 3 * block_size)
            sequence = Sequence(create_request(num_prompt, max_tokens), max_tokens, arrival_s=0.0)
            sequence.num_computed_tokens = allocator.start(sequence)
            if allocator.num_missing_blocks(sequence, num_prompt) > allocator.num_free_blocks:
                allocator.free(sequence)
                continue
            allocator.extend(sequence, num_prompt)
            sequence.num_computed_tokens = rng.randint(sequence.num_computed_tokens, num_prompt)
            sequence.num_committed_tokens = sequence.num_computed_tokens
            allocator.computed(sequence)
            ends[sequence.id] = rng.randint(num_prompt, num_prompt + max_tokens - 1)
            live.append(sequence)

        def end(sequence, ends=ends):
            return ends[sequence.id]

        use = measure_memory(allocator, live, end=end)
        counted = (use.num_used_slots, use.num_reserved_slots, use.num_internal_slots)
        assert counted == naive(allocator, live, end)
        assert use.num_slots == allocator.num_blocks * block_size
        assert use.num_free_slots == allocator.num_free_blocks * block_size


def test_a_sequence_left_out_is_noticed():
    allocator = PagedAllocator(20, 4)
    give(allocator, 6, 6)
    with pytest.raises(IntegrityError, match="0 are in tables and 18 free"):
        measure_memory(allocator, [])


def test_a_forks_shared_blocks_count_once_even_where_they_are_half_full():
    allocator = PagedAllocator(20, 4)
    parent = give(allocator, 6, 6, num_prompt_tokens=6)
    parent.num_committed_tokens = 6
    child = Sequence(parent.request, 8, arrival_s=0.0)
    child.fork = Fork(parent, 6)
    child.num_computed_tokens = allocator.start(child)
    assert child.num_computed_tokens == 5 and child.block_ids == parent.block_ids
    shared = measure_memory(allocator, [child, parent])
    assert shared == measure_memory(allocator, [parent, child]) == MemoryUse(6, 2, 0, 0, 72)
    allocator.extend(child, 6)  # it writes to the second block, and gets a copy
    assert measure_memory(allocator, [child, parent]) == MemoryUse(6 + 1, 2 + 3, 0, 0, 68)
