"""What one rendering of a chat template may use: memory that it makes, and time of its thread.

Owns the counting and the limits. Knows values, but not Jinja's syntax.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_CPU_S = 2.0  # a real template takes milliseconds
MAX_BYTES = 2**29  # made in all; some templates make a conversation's text once for each message
MAX_INT_BITS = 2048
MAX_PADDING = 10_000  # characters that a format string may write for one value
BYTES_OF_AN_ITEM = 8
BYTES_OF_A_SHORT_STRING = 64

# "%10d" pads to ten characters, and "%*d" and "{:{}}" to as many as an argument says.
PADDING = re.compile(
    r"%(?:\([^)]*\))?[-+ #0]*(?:\*|\d{5,}|\d*\.(?:\*|\d{5,}))|\{[^{}]*(?:\{|\d{5,})"
)


class BudgetError(SecurityError):
    """A template wants more than any real one."""


class _Budget:
    def __init__(self) -> None:
        self._num_bytes = 0
        self._num_unchecked = 0
        self._deadline_s = time.thread_time() + MAX_CPU_S

    def pay(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_BYTES:
            raise BudgetError("it needs too much memory")
        # The clock is asked for where much was made, and else now and then.
        self._num_unchecked += 4096 + num_bytes
        if self._num_unchecked > 2**18:
            self._num_unchecked = 0
            if time.thread_time() > self._deadline_s:
                raise BudgetError("it takes too long")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def budgeted() -> Iterator[None]:
    """Within it values can be paid for; each rendering has its own."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def pay(num_bytes: int) -> None:
    """Count memory that is used, or about to be, and time so far.

    Raises:
        BudgetError: it is too much, or nothing is rendered: constants are not folded at that cost.
    """
    budget = _budget.get(None)
    if budget is None:
        raise BudgetError("nothing is made before it is rendered")
    budget.pay(num_bytes)


def pay_for(value: Any) -> Any:
    """Pay for a new value, which refers to its items, and return it."""
    if isinstance(value, str):
        pay(sys.getsizeof(value))
    else:
        pay(BYTES_OF_AN_ITEM * (1 + len(value)) if isinstance(value, list | tuple | dict) else 8)
    return value


def pay_for_tree(value: Any) -> Any:
    """Pay for a literal: for all that it holds, but not for its strings.

    By paths: a list of twice the same list is twice as large, or a few of these would be endless.
    """
    for _ in _walk(value):
        pay(BYTES_OF_AN_ITEM)
    return value


def pay_for_text(value: Any, times: int = 1) -> Any:
    """Pay for the text that a value is about to become, and return the value."""
    for item in _walk(value):
        if isinstance(item, str):
            pay(sys.getsizeof(item) * times)
        elif isinstance(item, int) and item.bit_length() > MAX_INT_BITS:
            raise BudgetError("a number is too large")
        else:
            pay(BYTES_OF_A_SHORT_STRING * times)
    return value


def paid_turns(items: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through, each turn paid for."""
    for item in items:
        pay(BYTES_OF_AN_ITEM)
        yield item


def pay_for_repetition(left: Any, right: Any) -> None:
    """Pay for `left * right`."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | bytes | list | tuple) and isinstance(times, int):
            pay(sys.getsizeof(items) * max(0, times))


def pay_for_power(left: Any, right: Any) -> None:
    """Pay for `left ** right`."""
    is_whole = isinstance(left, int) and isinstance(right, int)
    if is_whole and left.bit_length() * right > MAX_INT_BITS:
        raise BudgetError("a number is too large")


def pay_for_format(pattern: str, values: Any) -> None:
    """Pay for a format string with these values in it, in either of Python's styles."""
    if PADDING.search(pattern):
        raise BudgetError("a format pads too far")
    num_places = pattern.count("%") + pattern.count("{")
    pay(sys.getsizeof(pattern) + num_places * MAX_PADDING)
    pay_for_text(values, times=num_places)


def pay_for_replacement(text: str, old: Any, new: Any) -> None:
    """Pay for all of `old` in `text` becoming `new`."""
    old, new = str(old), str(new)
    pay(sys.getsizeof(text) + text.count(old) * sys.getsizeof(new))


def joined(pieces: Iterable[Any], separator: str = "") -> str:
    """The text of all pieces, paid for before it is made."""
    texts = []
    for piece in pieces:
        pay_for_text(piece)
        pay(len(separator))
        texts.append(str(piece))
    return separator.join(texts)


def _walk(value: Any) -> Iterator[Any]:
    """A value and whatever it holds, as often as it holds it."""
    waiting: list[Iterator[Any]] = [iter((value,))]
    while waiting:
        for item in waiting[-1]:
            yield item
            inner = _items_of(item)
            if inner is not None:
                waiting.append(inner)
                break
        else:
            waiting.pop()


def _items_of(value: Any) -> Iterator[Any] | None:
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return iter(value)
    if isinstance(value, Namespace):  # it hides its attributes from templates
        attributes: dict[str, Any] = object.__getattribute__(value, "_Namespace__attrs")
        return iter(attributes.values())
    return None
