"""Stop strings: find the first one in a growing text, and hold back what may become one.

The result does not depend on how the text is cut into pieces: the stop string that is complete
first wins, and the longest of those that are complete at the same character.
"""

from collections.abc import Sequence


class StopStrings:
    """Watches one text for stop strings.

    `include` keeps the stop string in the text; otherwise no part of it is ever emitted.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        # Longest first, so that of stops with the same end the longest is found.
        self._stops = sorted(stops, key=len, reverse=True)
        if "" in self._stops:
            raise ValueError("an empty stop string would stop everything")
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched_lens = [0] * len(self._stops)  # how much of each stop the text ends with
        self._first_chars = tuple({stop[0] for stop in self._stops})
        self._include = include
        self._held = ""  # the longest end of the text that may still become a stop string
        self._found: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece; return (text that is safe to show, the stop string met or None).

        After a stop string, further text is dropped.
        """
        if self._found is not None:
            return "", self._found
        if not self._held and not any(char in text for char in self._first_chars):
            return text, None
        pending = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            stop = self._step(char)
            if stop is not None:
                self._found, self._held = stop, ""
                return pending[: index if self._include else index - len(stop)], stop
        num_safe = len(pending) - max(self._matched_lens)
        self._held = pending[num_safe:]
        return pending[:num_safe], None

    def flush(self) -> str:
        """The text held back, once it is certain that no more follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Knuth-Morris-Pratt on every stop at once: constant time a character, amortised."""
        for i, stop in enumerate(self._stops):
            matched_len = self._matched_lens[i]
            while matched_len and stop[matched_len] != char:
                matched_len = self._borders[i][matched_len - 1]
            if stop[matched_len] == char:
                matched_len += 1
            if matched_len == len(stop):
                return stop
            self._matched_lens[i] = matched_len
        return None


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of its longest proper prefix that is also its end."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        if stop[i] == stop[length]:
            length += 1
        borders[i] = length
    return borders
