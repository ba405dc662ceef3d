"""Block tables of groups of layers: what is kept, what is given back, what is found again."""

import pytest
from helpers import create_request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from octavo.core import RUNNING, WAITING, Fork, KVGroups, Sequence, Tier
from octavo.errors import IntegrityError
from octavo.kvcache import GroupedAllocator, GroupedPrefixAllocator, create_allocator

SIZE = 4  # tokens in a block


def create(windows, *, num_blocks=64, max_step_tokens=8, prefix_caching=True):
    name = "paged+prefix" if prefix_caching else "paged"
    groups = KVGroups(windows, max_step_tokens)
    return create_allocator(name, num_blocks, SIZE, max_model_len=256, groups=groups)


def sequence_of(prompt, max_tokens=64):
    return Sequence(
        create_request(prompt=list(prompt), max_tokens=max_tokens), max_tokens, arrival_s=0
    )


def begin(allocator, sequence):
    """Start it; return how many of its tokens were found."""
    sequence.num_computed_tokens = sequence.num_committed_tokens = allocator.start(sequence)
    sequence.status = RUNNING
    return sequence.num_computed_tokens


def compute(allocator, sequence, num_tokens):
    """One step that computes so many tokens, and its commit."""
    known = len(sequence.token_ids)
    allocator.extend(sequence, max(known, sequence.num_computed_tokens + num_tokens))
    sequence.num_computed_tokens += num_tokens
    sequence.num_committed_tokens += num_tokens
    allocator.computed(sequence)
    allocator.check_integrity([sequence])


def run(allocator, sequence, num_tokens=None, *, step=8):
    """Compute it up to so many tokens, those that it knows or new ones; return those found."""
    found = begin(allocator, sequence)
    num_tokens = num_tokens or len(sequence.token_ids)
    sequence.token_ids += [7] * (num_tokens - len(sequence.token_ids))
    while left := num_tokens - sequence.num_computed_tokens:
        compute(allocator, sequence, min(step, left))
    return found


def num_held(allocator):
    return allocator.num_blocks - allocator.num_free_blocks


def drop(allocator, sequence):
    allocator.free(sequence)
    sequence.status = WAITING


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize(("window", "most"), [(1, 1), (4, 2), (5, 2), (8, 3), (17, 5)])
def test_a_window_holds_its_own_blocks_however_long_the_context_is(window, most, prefix_caching):
    allocator = create((window,), prefix_caching=prefix_caching)
    sequence = sequence_of([1])
    begin(allocator, sequence)
    held = []
    for _ in range(100):
        compute(allocator, sequence, 1)
        sequence.token_ids.append(3)
        held.append(num_held(allocator))
    assert max(held) == most  # a window that begins within a block has a part of one more
    assert len(sequence.block_ids) == 25
    drop(allocator, sequence)
    assert num_held(allocator) == 0


def test_a_group_that_sees_everything_keeps_everything_beside_one_that_does_not():
    allocator = create((None, 8))
    sequence = sequence_of(range(80), max_tokens=1)
    run(allocator, sequence)
    assert num_held(allocator) == 20 + 2
    hole = allocator.num_blocks
    assert hole not in sequence.block_ids[0::2]
    assert sequence.block_ids[1::2].count(hole) == 18


def test_a_prompt_is_given_at_once_what_its_window_will_ever_need():
    """Else two prompts could start, and neither could go on."""
    groups = KVGroups((None, 8), 8)
    allocator = create((None, 8), max_step_tokens=8)
    sequence = sequence_of(range(100))
    begin(allocator, sequence)
    most = groups.num_blocks_for(100, SIZE)
    assert allocator.num_missing_blocks(sequence, 100) == most == 25 + 7
    compute(allocator, sequence, 8)
    while sequence.num_computed_tokens < 96:
        compute(allocator, sequence, 8)
        assert num_held(allocator) <= most
    assert allocator.num_blocks_for(100) == most


def test_the_next_step_may_be_planned_before_the_last_one_is_read():
    allocator = create((8,), prefix_caching=False)
    sequence = sequence_of(range(64))
    begin(allocator, sequence)
    in_flight = 0
    while sequence.num_computed_tokens < 64:
        allocator.extend(sequence, 64)
        sequence.num_computed_tokens += 8
        sequence.num_committed_tokens += in_flight
        in_flight = 8
        allocator.computed(sequence)
        allocator.check_integrity([sequence])
        first = max(0, sequence.num_computed_tokens - 8 - 8 + 1) // SIZE
        assert (
            allocator.num_blocks
            not in sequence.block_ids[first : sequence.num_computed_tokens // SIZE]
        )


def test_what_is_left_behind_a_window_is_found_until_it_is_used():
    allocator = create((8,), num_blocks=20)
    first = sequence_of(range(40))
    run(allocator, first)
    assert num_held(allocator) == 2
    second = sequence_of([*range(22), 99])
    # Blocks 0..4 are there, and a hit of 20 tokens wants those of tokens 13..19 only.
    assert begin(allocator, second) == 20
    assert second.block_ids[:3] == [20, 20, 20] and 20 not in second.block_ids[3:]


def test_a_hit_needs_the_whole_past_only_where_somebody_sees_it():
    prompt = list(range(40))
    for windows, expected in (((8,), 36), ((None, 8), 0), ((None,), 0)):
        groups = KVGroups(windows, 8)
        allocator = GroupedPrefixAllocator(64, SIZE, groups=groups)
        sequence = sequence_of(prompt)
        run(allocator, sequence)
        drop(allocator, sequence)
        for group in range(len(windows)):  # the beginning is used for something else
            allocator._pool.forget(allocator._find(sequence, 0, group))
        assert begin(allocator, sequence_of(prompt)) == expected


def test_a_hit_ends_where_a_window_has_lost_a_block():
    prompt = list(range(60))
    allocator = create((None, 8))
    sequence = sequence_of(prompt)
    run(allocator, sequence)
    drop(allocator, sequence)
    # Of 56 tokens the window wants blocks 12 and 13, of 48 blocks 10 and 11.
    allocator._pool.forget(allocator._find(sequence, 12, 1))
    again = sequence_of(prompt)
    assert begin(allocator, again) == 48
    assert [i for i, b in enumerate(again.block_ids[1::2]) if b != 64] == [10, 11]
    drop(allocator, again)
    allocator._pool.forget(allocator._find(sequence, 5, 0))
    assert begin(allocator, sequence_of(prompt)) == 20


def test_two_windows_must_agree_on_a_hit():
    prompt = list(range(60))
    allocator = create((None, 8, 16))
    sequence = sequence_of(prompt)
    run(allocator, sequence)
    drop(allocator, sequence)
    allocator._pool.forget(allocator._find(sequence, 13, 1))  # the short one allows 52
    allocator._pool.forget(allocator._find(sequence, 10, 2))  # the long one no more than 40
    assert begin(allocator, sequence_of(prompt)) == 40


def test_nothing_of_a_sequence_that_was_wrong_is_found_not_even_what_it_left_behind():
    allocator = create((8,))
    sequence = sequence_of(range(40))
    run(allocator, sequence)
    allocator.discredit(sequence)
    drop(allocator, sequence)
    assert begin(allocator, sequence_of(range(40))) == 0


def test_a_fork_shares_what_its_window_sees_and_copies_the_block_that_it_writes_to():
    allocator = create((None, 8))
    parent = sequence_of(range(30))
    run(allocator, parent)
    held = num_held(allocator)
    child = sequence_of([*range(30), 5])
    child.fork = Fork(parent, 30)
    assert begin(allocator, child) == 30
    assert num_held(allocator) == held
    assert allocator.num_missing_blocks(child, 31) == 2  # of the block that both have begun
    allocator.extend(child, 31)
    copies = allocator.take_transfers()
    assert [(t.source_tier, t.target_tier) for t in copies] == [(Tier.DEVICE, Tier.DEVICE)] * 2
    assert {t.source for t in copies} == set(parent.block_ids[14:16])
    assert {t.target for t in copies} == set(child.block_ids[14:16])
    allocator.check_integrity([parent, child])


def test_a_fork_of_one_that_has_gone_on_computes_its_own_beginning():
    allocator = create((None, 8), prefix_caching=False)
    parent = sequence_of(range(30))
    run(allocator, parent, 50)
    child = sequence_of(range(31))
    child.fork = Fork(parent, 30)
    assert begin(allocator, child) == 0
    assert child.block_ids == []


def test_a_request_that_no_pool_of_this_size_could_hold_needs_more_than_it_has():
    allocator = create((None, 8), num_blocks=32)
    assert allocator.num_blocks_for(100) == 32
    assert allocator.num_blocks_for(101) == 33 > allocator.num_blocks


def test_integrity_notices_a_hole_where_somebody_looks_and_blocks_that_nobody_sees():
    allocator = create((None, 8))
    sequence = sequence_of(range(30))
    run(allocator, sequence)
    place = sequence.block_ids[15]
    sequence.block_ids[15] = allocator.num_blocks
    with pytest.raises(IntegrityError):
        allocator.check_integrity([sequence])
    allocator._pool.give_back([place])
    with pytest.raises(IntegrityError, match="a hole among the blocks that it sees"):
        allocator.check_integrity([sequence])
    keeps = create((8,), prefix_caching=False)
    keeps.computed = lambda sequence: None
    with pytest.raises(IntegrityError, match="nobody sees any more"):
        run(keeps, sequence_of(range(60)))


def test_one_group_that_keeps_everything_is_served_by_the_plain_allocators():
    assert not isinstance(create((None,)), GroupedAllocator)
    assert type(create((None, 4), prefix_caching=False)) is GroupedAllocator


class GroupsMachine(RuleBasedStateMachine):
    """The allocator against memory that knows what was written where.

    Every step writes its tokens to each group's slots, and then reads all that the group's window
    shows. What it reads must be what this very sequence has there.
    """

    NUM_BLOCKS = 36
    MAX_STEP = 6

    @initialize(
        windows=st.sampled_from([(6,), (None, 3), (None, 9, 2), (11, 4)]), prefixes=st.booleans()
    )
    def build(self, windows, prefixes):
        kind = GroupedPrefixAllocator if prefixes else GroupedAllocator
        self.windows = windows
        self.groups = KVGroups(windows, self.MAX_STEP)
        self.allocator = kind(self.NUM_BLOCKS, SIZE, groups=self.groups)
        self.live: list[Sequence] = []
        self.in_flight: list[tuple[Sequence, int]] = []
        self.slots: dict[int, tuple[int, ...]] = {}  # slot -> all tokens up to the one that it has

    def slot(self, sequence, position, group):
        index, offset = divmod(position, SIZE)
        block_id = sequence.block_ids[index * len(self.windows) + group]
        assert block_id != self.NUM_BLOCKS, "a hole is written or read"
        return block_id * SIZE + offset

    def step(self, sequence, num_tokens):
        """Plan and run a step, if there are blocks for it; say whether there were."""
        known = max(len(sequence.token_ids), sequence.num_computed_tokens + num_tokens)
        missing = self.allocator.num_missing_blocks(sequence, known)
        if missing > self.allocator.num_free_blocks:
            return False
        free = self.allocator.num_free_blocks
        before = list(sequence.block_ids)
        first = self.allocator.extend(sequence, known)
        assert free - self.allocator.num_free_blocks <= missing
        assert sequence.block_ids[:first] == before[:first]
        for transfer in self.allocator.take_transfers():
            for offset in range(SIZE):
                source = self.slots.get(transfer.source * SIZE + offset)
                self.slots[transfer.target * SIZE + offset] = source
        start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        tokens = tuple(sequence.token_ids)
        for group, window in enumerate(self.windows):
            for position in range(start, stop):
                self.slots[self.slot(sequence, position, group)] = tokens[: position + 1]
            seen = 0 if window is None else max(0, start - window + 1)
            for position in range(seen, stop):
                found = self.slots.get(self.slot(sequence, position, group))
                assert found == tokens[: position + 1]
        sequence.num_computed_tokens = stop
        sequence.status = RUNNING
        self.in_flight.append((sequence, num_tokens))
        return True

    def admit(self, sequence, data):
        sequence.num_computed_tokens = self.allocator.start(sequence)
        assert sequence.num_computed_tokens < len(sequence.token_ids)
        sequence.num_committed_tokens = sequence.num_computed_tokens
        left = len(sequence.token_ids) - sequence.num_computed_tokens
        if self.step(sequence, data.draw(st.integers(1, min(left, self.MAX_STEP)))):
            self.live.append(sequence)
        else:
            self.allocator.stop(sequence)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=40), data=st.data())
    def add(self, prompt, data):
        self.admit(sequence_of(prompt), data)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.live))
        common = data.draw(st.integers(1, len(parent.token_ids)))
        child = sequence_of(
            [*parent.token_ids[:common], *data.draw(st.lists(st.just(2), max_size=3))]
        )
        child.fork = Fork(parent, common)
        self.admit(child, data)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def go_on(self, data):
        sequence = data.draw(st.sampled_from(self.live))
        left = len(sequence.token_ids) - sequence.num_computed_tokens
        if left and sum(one is sequence for one, _ in self.in_flight) < 2:
            self.step(sequence, data.draw(st.integers(1, min(left, self.MAX_STEP))))

    @precondition(lambda self: self.in_flight)
    @rule(token=st.integers(0, 2))
    def commit(self, token):
        sequence, num_tokens = self.in_flight.pop(0)
        sequence.num_committed_tokens += num_tokens
        self.allocator.computed(sequence)
        if sequence.num_committed_tokens == len(sequence.token_ids) < 60:
            sequence.token_ids.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), wrong=st.booleans())
    def end(self, data, wrong):
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.in_flight = [(one, n) for one, n in self.in_flight if one is not sequence]
        if wrong:
            self.allocator.discredit(sequence)
        drop(self.allocator, sequence)

    @rule()
    def forget_all(self):
        self.allocator.forget_all()

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_integrity(self.live)
        for sequence in self.live:
            held = sum(block_id != self.NUM_BLOCKS for block_id in sequence.block_ids)
            most = self.groups.num_blocks_for(
                len(sequence.block_ids) // len(self.windows) * SIZE, SIZE
            )
            assert held <= most

    def teardown(self):
        if hasattr(self, "allocator"):
            for sequence in self.live:
                self.allocator.free(sequence)
            assert self.allocator.num_free_blocks == self.NUM_BLOCKS


GroupsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGroups = GroupsMachine.TestCase
