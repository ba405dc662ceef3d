import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.errors import IntegrityError
from octavo.kvcache import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model so plain that it cannot be wrong: tables, and what blocks hold."""

    NUM_BLOCKS = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # block -> key, for all that can still be found

    def num_held(self) -> int:
        return len({b for table in self.tables for b in table})

    @rule(data=st.data())
    def take(self, data):
        count = data.draw(st.integers(0, self.NUM_BLOCKS - self.num_held()))
        taken = self.pool.take(count)
        assert len(taken) == count
        assert not set(taken) & {b for table in self.tables for b in table}
        self.tables.append(taken)
        for block_id in taken:
            self.contents.pop(block_id, None)  # it is given out for something else

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def name(self, data, key):
        block_id = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        self.pool.name(block_id, key)
        if block_id not in self.contents and key not in self.contents.values():
            self.contents[block_id] = key

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def find_and_share(self, data):
        block_id, key = data.draw(st.sampled_from(sorted(self.contents.items())))
        assert self.pool.find(key) == block_id
        self.pool.share(block_id)
        self.tables.append([block_id])

    @rule(key=st.binary(min_size=1, max_size=1))
    def find_nothing(self, key):
        if key not in self.contents.values():
            assert self.pool.find(key) is None

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        self.contents.clear()

    @rule(extra=st.integers(1, 5))
    def take_too_many(self, extra):
        with pytest.raises(IntegrityError):
            self.pool.take(self.NUM_BLOCKS - self.num_held() + extra)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give_back(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.give_back(self.tables.pop(index))

    @invariant()
    def the_books_agree(self):
        assert self.pool.num_free == self.NUM_BLOCKS - self.num_held()
        assert self.pool.num_cached == len(self.contents)
        self.pool.check_integrity(self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, deadline=None)


def test_a_double_free_is_noticed():
    pool = BlockPool(4)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(IntegrityError, match="freed twice"):
        pool.give_back(taken)


def test_the_recount_finds_a_leak_and_a_stranger():
    pool = BlockPool(4)
    taken = pool.take(2)
    with pytest.raises(IntegrityError):
        pool.check_integrity([])
    with pytest.raises(IntegrityError):
        pool.check_integrity([taken, [3]])
    with pytest.raises(IntegrityError, match="twice in one table"):
        pool.check_integrity([taken + taken[:1]])
