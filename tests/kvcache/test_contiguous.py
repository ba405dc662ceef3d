"""Allocators before paging: their pools against a row of booleans, and engines that run on them."""

import pytest
from helpers import VOCAB_SIZE, create_core, create_request, run_to_end, tokens_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.core import Sequence
from octavo.errors import ConfigError, IntegrityError
from octavo.kvcache import ALLOCATORS, BuddyAllocator, ContiguousAllocator, create_allocator
from octavo.kvcache.run_pools import BuddyPool, FirstFitPool
from octavo.scheduler import Blocks, Scheduler, SequenceSlots, TokenBudget
from octavo.sim import VirtualClock, oracle_tokens


class PoolMachine(RuleBasedStateMachine):
    """A pool of runs against one boolean a block: is it given out?"""

    kind = FirstFitPool

    @initialize(num_blocks=st.integers(1, 21))
    def create(self, num_blocks):
        self.pool = self.kind(num_blocks)
        self.is_given = [False] * num_blocks
        self.held = {}

    def places(self, count):
        """Where a run may begin, as the booleans have it."""
        firsts = range(len(self.is_given) - count + 1)
        return [first for first in firsts if not any(self.is_given[first : first + count])]

    def a_count(self, data):
        return data.draw(st.integers(1, len(self.is_given)))

    def expected_place(self, places):
        return places[:1]

    @rule(data=st.data())
    def take(self, data):
        count = self.a_count(data)
        places = self.places(count)
        if not places:
            with pytest.raises(IntegrityError, match="asked for"):
                self.pool.take(count)
            return
        first = self.pool.take(count)
        assert first in self.expected_place(places)
        self.is_given[first : first + count] = [True] * count
        self.held[first] = count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        first = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.give_back(first)
        count = self.held.pop(first)
        self.is_given[first : first + count] = [False] * count
        with pytest.raises(IntegrityError, match="freed twice"):
            self.pool.give_back(first)

    @invariant()
    def the_books_agree(self):
        assert self.pool.num_free == self.is_given.count(False)
        free = [False] * len(self.is_given)
        for first, count in self.pool.free_runs.items():
            free[first : first + count] = [True] * count
        assert free == [not given for given in self.is_given]
        self.pool.check_integrity(self.held)


class BuddyMachine(PoolMachine):
    """Buddies lie at multiples of their size; any such place that is free must be found."""

    kind = BuddyPool

    def places(self, count):
        return [first for first in super().places(count) if first % count == 0]

    def a_count(self, data):
        return 1 << data.draw(st.integers(0, len(self.is_given).bit_length()))

    def expected_place(self, places):
        return places


TestFirstFit = PoolMachine.TestCase
TestFirstFit.settings = settings(max_examples=60, deadline=None)
TestBuddy = BuddyMachine.TestCase
TestBuddy.settings = settings(max_examples=60, deadline=None)


def test_a_buddy_run_is_cut_from_the_smallest_that_has_it():
    pool = BuddyPool(12)
    assert pool.free_runs == {0: 8, 8: 4}
    assert pool.take(2) == 8
    assert pool.free_runs == {0: 8, 10: 2}
    with pytest.raises(IntegrityError, match="no power of two"):
        pool.take(3)


def create_sequence(num_prompt_tokens, max_tokens):
    request = create_request(num_prompt_tokens, max_tokens)
    return Sequence(request, max_tokens, arrival_s=0.0)


def give(allocator, num_prompt_tokens=5, max_tokens=4):
    """A sequence that holds what the allocator gives it."""
    sequence = create_sequence(num_prompt_tokens, max_tokens)
    allocator.start(sequence)
    allocator.extend(sequence, num_prompt_tokens)
    return sequence


@pytest.mark.parametrize(
    ("allocator", "num_run_blocks"),
    [
        (ContiguousAllocator(20, 4, max_model_len=29), 7),  # 28 tokens: the last is not computed
        (ContiguousAllocator(20, 4, max_model_len=30), 8),
        (BuddyAllocator(20, 4), 4),  # 12 tokens are 3 blocks, and 4 a power of two
    ],
)
def test_a_run_is_given_once_and_whole(allocator, num_run_blocks):
    sequence = create_sequence(5, 8)
    assert allocator.start(sequence) == 0
    assert allocator.num_missing_blocks(sequence, 5) == num_run_blocks
    assert allocator.extend(sequence, 5) == 0
    first = sequence.block_ids[0]
    assert sequence.block_ids == list(range(first, first + num_run_blocks))
    assert allocator.num_free_blocks == 20 - num_run_blocks
    for num_tokens in range(6, 13):
        assert allocator.num_missing_blocks(sequence, num_tokens) == 0
        assert allocator.extend(sequence, num_tokens) == num_run_blocks
    assert len(sequence.block_ids) == num_run_blocks
    allocator.check_integrity([sequence])
    allocator.free(sequence)
    assert sequence.block_ids == [] and allocator.num_free_blocks == 20
    allocator.check_integrity([sequence])


def test_free_blocks_that_form_no_run_are_not_offered():
    allocator = BuddyAllocator(8, 1)
    sequences = [give(allocator, 2, 1) for _ in range(4)]  # two blocks each
    allocator.free(sequences[0])
    allocator.free(sequences[2])
    wish = create_sequence(4, 1)
    assert allocator.num_free_blocks == 4
    assert allocator.num_missing_blocks(wish, 4) > allocator.num_free_blocks
    assert allocator.num_stranded_blocks(wish) == 4
    allocator.free(sequences[1])
    assert allocator.num_missing_blocks(wish, 4) == 4
    assert allocator.num_stranded_blocks(wish) == 2
    allocator.extend(wish, 4)
    assert wish.block_ids == [0, 1, 2, 3]
    allocator.check_integrity([wish, sequences[3]])


def test_what_can_never_fit_needs_more_than_the_pool():
    contiguous = ContiguousAllocator(6, 4, max_model_len=29)
    assert contiguous.num_blocks_for(1) == 7 > contiguous.num_blocks
    buddy = BuddyAllocator(12, 4)
    assert buddy.num_blocks_for(32) == 8
    # Nine of twelve blocks: no run of sixteen will ever be there, however empty the pool.
    assert buddy.num_blocks_for(33) == 16 > buddy.num_blocks


def test_a_fork_computes_everything_itself():
    allocator = BuddyAllocator(16, 4)
    parent = give(allocator)
    child = create_sequence(5, 4)
    assert allocator.start(child) == 0
    assert not allocator.refork(child, parent.block_ids)
    assert child.block_ids == []


def swap_two(allocator, sequence):
    sequence.block_ids[0], sequence.block_ids[1] = sequence.block_ids[1], sequence.block_ids[0]


def give_part_back(allocator, sequence):
    del sequence.block_ids[-1]


def forget(allocator, sequence):
    sequence.block_ids = []


def move(allocator, sequence):
    sequence.block_ids = [block_id + 4 for block_id in sequence.block_ids]


def free_too_early(allocator, sequence):
    block_ids = list(sequence.block_ids)
    allocator.free(sequence)
    sequence.block_ids = block_ids


@pytest.mark.parametrize("mistake", [swap_two, give_part_back, forget, move, free_too_early])
@pytest.mark.parametrize(
    "create",
    [lambda: ContiguousAllocator(16, 4, max_model_len=13), lambda: BuddyAllocator(16, 4)],
)
def test_the_recount_finds_mistakes_in_tables(create, mistake):
    allocator = create()
    sequences = [give(allocator, 6, 4), give(allocator, 6, 4)]
    allocator.check_integrity(sequences)
    mistake(allocator, sequences[0])
    with pytest.raises(IntegrityError):
        allocator.check_integrity(sequences)


def test_the_recount_finds_two_sequences_in_one_run():
    allocator = BuddyAllocator(16, 4)
    sequence, other = give(allocator), create_sequence(5, 4)
    other.block_ids = list(sequence.block_ids)
    with pytest.raises(IntegrityError, match="shares its run"):
        allocator.check_integrity([sequence, other])


def test_the_recount_finds_a_run_that_is_too_short():
    allocator = BuddyAllocator(16, 4)
    sequence = give(allocator)
    sequence.max_num_computed_tokens += 16
    with pytest.raises(IntegrityError, match="not hold what was reserved"):
        allocator.check_integrity([sequence])


class ForgetfulFirstFit(FirstFitPool):
    """Does not join a freed run with its neighbours."""

    def give_back(self, first):
        self._add(first, self._held.pop(first))


class ForgetfulBuddies(BuddyPool):
    """Leaves two free halves as they are."""

    def give_back(self, first):
        self._free[first] = self._held.pop(first)


@pytest.mark.parametrize("kind", [ForgetfulFirstFit, ForgetfulBuddies])
def test_the_recount_finds_runs_that_did_not_join(kind):
    pool = kind(8)
    firsts = [pool.take(4), pool.take(4)]
    for first in firsts:
        pool.give_back(first)
    with pytest.raises(IntegrityError, match="did not join"):
        pool.check_integrity({})


class SloppyBuddies(BuddyPool):
    """Gives runs of any length."""

    def take(self, count):
        first, length = self._free.popitem()
        self._free[first + count] = length - count
        self._held[first] = count
        return first


def test_the_recount_finds_runs_that_are_no_buddies():
    pool = SloppyBuddies(8)
    first = pool.take(3)
    with pytest.raises(IntegrityError, match="no buddy's"):
        pool.check_integrity({first: 3})


def test_the_recount_finds_blocks_that_are_nobodys():
    pool = FirstFitPool(8)
    first = pool.take(3)
    pool._remove(3)
    with pytest.raises(IntegrityError, match="exactly once"):
        pool.check_integrity({first: 3})


def create_scheduler(name):
    allocator = create_allocator(name, 40, 4, max_model_len=64)
    constraints = [TokenBudget(16), SequenceSlots(8), Blocks(allocator)]
    return Scheduler(allocator, constraints, max_model_len=64, clock=VirtualClock())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_engine_gives_the_same_tokens_with_every_allocator(name, asynchronous):
    core = create_core(create_scheduler(name), asynchronous=asynchronous)
    requests = [create_request(3 + 5 * i % 23, 1 + 7 * i % 31) for i in range(24)]
    for request in requests:
        core.add(request)
    events = run_to_end(core)
    for request in requests:
        expected = oracle_tokens(request.prompt_token_ids, request.sampling.max_tokens, VOCAB_SIZE)
        assert tokens_of(events, request.request_id) == expected
    stats = core.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_reservation_costs_places():
    """In a pool of 40 blocks of 4, contexts of 64 leave room for two; pages for many more."""
    most = {}
    for name in ALLOCATORS:
        core = create_core(create_scheduler(name))
        for index in range(8):
            core.add(create_request(prompt=[index] * 6, max_tokens=10))
        most[name] = 0
        while core.has_work:
            core.step()
            most[name] = max(most[name], core.stats().num_running)
    assert most["contiguous"] == 2
    assert most["contiguous"] < most["contiguous-buddy"] <= most["paged"]
    assert most["paged"] == most["paged+prefix"] > 6


def test_an_unknown_allocator_is_refused_with_the_names_of_the_others():
    with pytest.raises(ConfigError, match="'slab'.*contiguous, contiguous-buddy, paged"):
        create_allocator("slab", 8, 4, max_model_len=16)
