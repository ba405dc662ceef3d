"""The check after each fault finds what it is there to find."""

from typing import cast

import pytest
from faults import aftermath
from faults.aftermath import MAX_BOUTS, Footprint, play_until_it_adds_nothing
from faults.processes import Server

BEFORE = Footprint(pid=7, num_threads=5, rss_bytes=100_000_000)


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        (Footprint(7, 5, 101_000_000), True),
        (Footprint(7, 4, 50_000_000), True),
        (Footprint(7, 5, 101_000_001), False),
        (Footprint(7, 6, 100_000_000), False),
        (Footprint(8, 5, 100_000_000), False),
    ],
)
def test_one_percent_no_more_threads_and_the_same_process(now: Footprint, holds: bool) -> None:
    assert BEFORE.holds(now) is holds


class Growing:
    """A server that is larger each time it is looked at while `leaks`."""

    def __init__(self, num_leaking: int):
        self.num_left, self.rss_bytes, self.num_bouts = num_leaking, 100_000_000, 0
        self.process = self

    def poll(self) -> None:
        """It runs."""

    def until(self, condition: object) -> None:
        """At once."""

    def is_at_rest(self) -> bool:
        return True

    def bout(self) -> None:
        self.num_bouts += 1
        self.rss_bytes += 2_000_000 * (self.num_left > 0)
        self.num_left -= 1


@pytest.mark.parametrize(("num_leaking", "num_bouts"), [(0, 1), (2, 3), (99, MAX_BOUTS)])
def test_bouts_end_when_one_adds_nothing_and_a_leak_is_left_to_be_judged(
    num_leaking: int, num_bouts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Growing(num_leaking)
    server = cast(Server, fake)
    monkeypatch.setattr(Footprint, "of", lambda server: [Footprint(7, 5, server.rss_bytes)])
    play_until_it_adds_nothing(server, fake.bout)
    assert fake.num_bouts == num_bouts
    [noted], [now] = aftermath._baselines[server], Footprint.of(server)
    assert noted.holds(now) is (num_leaking < MAX_BOUTS)
