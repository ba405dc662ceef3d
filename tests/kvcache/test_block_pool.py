import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.errors import IntegrityError
from octavo.kvcache import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model so plain that it cannot be wrong: a list of tables."""

    NUM_BLOCKS = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.tables: list[list[int]] = []

    def num_held(self) -> int:
        return sum(map(len, self.tables))

    @rule(data=st.data())
    def take(self, data):
        count = data.draw(st.integers(0, self.NUM_BLOCKS - self.num_held()))
        taken = self.pool.take(count)
        assert len(taken) == count
        assert not set(taken) & {b for table in self.tables for b in table}
        self.tables.append(taken)

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
