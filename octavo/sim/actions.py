"""What the world does to an engine, and when. Plain data in virtual seconds; knows no engine."""

import msgspec

from octavo.core import Request


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happens at a moment."""

    at_s: float


class Arrive(Action, frozen=True, kw_only=True):
    """A client sends a request, and perhaps wants more than one answer to it."""

    request: Request
    siblings: tuple[Request, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """All answers that the client waits for."""
        return (self.request, *self.siblings)


class Cancel(Action, frozen=True, kw_only=True):
    """Clients go away; of some of them nobody may have heard, or they may have been answered."""

    request_ids: tuple[str, ...]


class CancelEverybody(Action, frozen=True, kw_only=True):
    """An abort storm: every client goes away at once."""


class Squeeze(Action, frozen=True, kw_only=True):
    """From now on so many free KV blocks seem to be taken; 0 ends it."""

    num_blocks: int


class JumpWallClock(Action, frozen=True, kw_only=True):
    """Somebody sets the clock on the wall, forward or back."""

    seconds: float


class Pause(Action, frozen=True, kw_only=True):
    """The process stands still, as under SIGSTOP: time passes and nothing happens."""

    seconds: float


class Drain(Action, frozen=True, kw_only=True):
    """Nobody is admitted any more; who is in is served to the end."""
