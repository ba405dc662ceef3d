"""What an answer of a chat is made of, piece by piece. Knows no markers and no JSON of a surface.

Joined, the events of an answer do not depend on how its text was cut into pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself, before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a known function begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete, and its arguments are an object."""

    index: int


@dataclass(frozen=True, slots=True)
class Retraction:
    """A call that had begun is none: `text` is all that the model wrote of it.

    Who has told of the call already can no longer take it back; nobody has seen `unsent` yet.
    """

    index: int
    text: str
    unsent: str


Event = Content | Reasoning | CallStart | CallArguments | CallEnd | Retraction


@dataclass(slots=True)
class Call:
    """A function to be called, with the JSON text of its arguments."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    calls: dict[int, Call] = field(default_factory=dict)  # by index, in order

    @classmethod
    def of(cls, events: Sequence[Event]) -> "Reply":
        """The answer that the events add up to. Calls that were retracted are content."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, Call] = {}
        for event in events:
            match event:
                case Content(text):
                    content.append(text)
                case Reasoning(text):
                    reasoning.append(text)
                case CallStart(index, name):
                    calls[index] = Call(name)
                case CallArguments(index, text):
                    calls[index].arguments += text
                case Retraction(index, text):
                    del calls[index]
                    content.append(text)
        return cls("".join(reasoning), "".join(content), calls)


def num_held_back(text: str, marker: str) -> int:
    """Characters at the end of `text` with which `marker` may have begun."""
    for num in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:num]):
            return num
    return 0
