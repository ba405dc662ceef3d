"""What must hold after every fault that a server survives: it is what it was before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard
from weakref import WeakKeyDictionary

import psutil
from faults.processes import Server

RSS_SHARE = 0.01
MAX_BOUTS = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """A process as the system sees it."""

    pid: int
    num_threads: int
    rss_bytes: int

    @classmethod
    def of(cls, server: Server) -> "list[Footprint]":
        """Of the front end and of every process below it, the engine among them."""
        front = psutil.Process(server.process.pid)
        family = [front, *front.children(recursive=True)]
        return [cls(p.pid, p.num_threads(), p.memory_info().rss) for p in family]

    def holds(self, now: "Footprint") -> bool:
        """Whether the same process has no more threads, and at most 1% more memory."""
        is_as_large = now.rss_bytes <= self.rss_bytes * (1 + RSS_SHARE)
        return now.pid == self.pid and now.num_threads <= self.num_threads and is_as_large


_baselines: WeakKeyDictionary[Server, list[Footprint]] = WeakKeyDictionary()


@contextmanager
def unharmed(server: Server, expected: Sequence[int]) -> Iterator[None]:
    """Inside, something happens to a server that must be what it was when it is over.

    expected: what the model says to the known prompt, by somebody else's word.
    """
    server.until(server.is_at_rest)
    assert golden(server) == expected
    note_baseline(server)
    yield
    assert server.process.poll() is None, "".join(server.err)
    server.until(server.is_at_rest)
    server.until(lambda: server.state == "ok")
    assert golden(server) == expected
    server.until(server.is_at_rest)
    before, now = _baselines[server], Footprint.of(server)
    assert _all_hold(before, now), (before, now)


def note_baseline(server: Server) -> None:
    """What was played until now was to warm up: what comes is held against this moment."""
    server.until(server.is_at_rest)
    _baselines[server] = Footprint.of(server)


def is_watched(server: object) -> TypeGuard[Server]:
    """Whether `unharmed` will judge it."""
    return isinstance(server, Server) and server in _baselines


def play_until_it_adds_nothing(server: Server, bout: Callable[[], None]) -> None:
    """Play something again until a bout adds nothing; `unharmed` judges the last one.

    What fills a cache may need several bouts: allocators have a heap for each thread, and which
    thread fills its own is chance. A leak adds to every bout.
    """
    for _ in range(MAX_BOUTS):
        note_baseline(server)
        bout()
        if server.process.poll() is not None:
            return
        server.until(server.is_at_rest)
        if _all_hold(_baselines[server], Footprint.of(server)):
            return


def _all_hold(before: Sequence[Footprint], now: Sequence[Footprint]) -> bool:
    return len(before) == len(now) and all(map(Footprint.holds, before, now))


def golden(server: Server) -> list[int]:
    """What the model says to the known prompt."""
    choice = server.complete(return_token_ids=True).json()["choices"][0]
    ids: list[int] = choice["token_ids"]
    return ids
