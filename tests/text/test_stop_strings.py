"""Stop strings: never leaked, never missed, whatever the pieces."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.text import StopStrings


def run(stops, pieces, include=False):
    """All text emitted and the stop string met, as a server would use the class."""
    watcher = StopStrings(stops, include)
    shown = ""
    for piece in pieces:
        text, stop = watcher.feed(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + watcher.flush(), None


def first_stop(stops, text):
    """The definition: the stop that ends first, and the longest of those that end there."""
    found = [
        (end, -len(stop), stop)
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    return min(found) if found else None


texts = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


@given(stops=stop_lists, pieces=st.lists(texts, max_size=8), include=st.booleans())
def test_any_cut_gives_what_the_definition_says(stops, pieces, include):
    text = "".join(pieces)
    found = first_stop(stops, text)
    if found is None:
        assert run(stops, pieces, include) == (text, None)
    else:
        end, minus_len, stop = found
        assert run(stops, pieces, include) == (text[: end if include else end + minus_len], stop)


@given(stops=stop_lists, pieces=st.lists(texts, max_size=8))
def test_only_what_may_become_a_stop_is_held_back(stops, pieces):
    watcher = StopStrings(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        text, stop = watcher.feed(piece)
        shown += text
        if stop is not None:
            return
        held = seen[len(shown) :]
        assert not held or any(other.startswith(held) for other in stops)


def test_nothing_follows_a_stop():
    watcher = StopStrings(["END"])
    assert watcher.feed("a END b") == ("a ", "END")
    assert watcher.feed("more") == ("", "END")
    assert watcher.flush() == ""


def test_no_stops_pass_all():
    assert run([], ["a", "b"]) == ("ab", None)


def test_half_a_stop_comes_out_at_the_end():
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.feed("answer\n\nUs") == ("answer", None)
    assert watcher.flush() == "\n\nUs"


def test_empty_stop_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_hostile_stops_cost_little():
    stops = ["a" * 999 + chr(ord("b") + i) for i in range(16)]
    watcher = StopStrings(stops)
    start = time.perf_counter()
    for _ in range(1000):
        assert watcher.feed("aaaa")[1] is None
    assert time.perf_counter() - start < 2
