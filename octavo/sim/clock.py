"""Time that passes only when told to: a monotonic clock, and one on the wall that may jump."""


class VirtualClock:
    """A `Clock` whose hands are moved by the caller. Seconds.

    The engine reads `now()`, which never goes back. The wall clock is what a machine's owner sets:
    nothing inside the engine may depend on it, which is why the simulator makes it jump.
    """

    def __init__(self, start_s: float = 0.0, *, wall_offset_s: float = 1.7e9):
        self._now_s = start_s
        self._wall_offset_s = wall_offset_s

    def now(self) -> float:
        return self._now_s

    def wall(self) -> float:
        """What a calendar on the wall shows."""
        return self._now_s + self._wall_offset_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass; they cannot be negative."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self._now_s += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward, or back, without any time passing."""
        self._wall_offset_s += seconds
