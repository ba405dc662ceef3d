"""How much a key may use: requests and tokens a minute, and tokens in all.

Token buckets (a minute's worth at most, refilled steadily), and one book of what was used that
survives restarts. Knows no HTTP and no keys.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from octavo.errors import ConfigError, OctavoError

logger = logging.getLogger(__name__)

MINUTE_S = 60.0
SAVE_INTERVAL_S = 5.0


class AllowanceError(OctavoError):
    """A key may not use more for now, or, where `retry_after_s` is None, at all."""

    def __init__(self, message: str, *, retry_after_s: float | None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Bucket:
    """Holds a minute's worth, begins full, and refills steadily."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._then_s = clock()

    @property
    def level(self) -> float:
        """What is left; negative after somebody used more than was thought."""
        now = self._clock()
        refill = (now - self._then_s) * self.per_minute / MINUTE_S
        self._level = min(float(self.per_minute), self._level + refill)
        self._then_s = now
        return self._level

    def seconds_until(self, amount: float) -> float:
        """How long until so much is left; what never fits is let through by a full bucket."""
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * MINUTE_S / self.per_minute)

    def take(self, amount: float) -> None:
        """Take out, or with a negative amount put back."""
        self._level = min(float(self.per_minute), self.level - amount)


class Usage:
    """Tokens used in all, by key, in a file of JSON where one is given. Sole writer of the file."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic):
        self._path = path
        self._clock = clock
        self._used: dict[str, int] = {} if path is None else _read_usage(path)
        self._saved_s = clock()

    def of(self, name: str) -> int:
        """Tokens that this key has used."""
        return self._used.get(name, 0)

    def add(self, name: str, num_tokens: int) -> None:
        """Note more of them; the file follows within seconds."""
        self._used[name] = self.of(name) + num_tokens
        if self._clock() - self._saved_s >= SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Replace the file as a whole. A full disk costs the books, never an answer."""
        self._saved_s = self._clock()
        if self._path is None:
            return
        beside = self._path.with_name(f"{self._path.name}.new")
        try:
            beside.write_text(json.dumps(self._used, indent=1), encoding="utf-8")
            os.replace(beside, self._path)
        except OSError as error:
            logger.error("the usage file %s is not written: %s", self._path, error.strerror)


def _read_usage(path: Path) -> dict[str, int]:
    try:
        used = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"the usage file {path} cannot be read: {error}") from None
    if not isinstance(used, dict) or not all(isinstance(n, int) for n in used.values()):
        raise ConfigError(f"the usage file {path} must map names of keys to numbers of tokens")
    return used


class Reservation:
    """Tokens that a request may need at most, until it is known how many it took."""

    def __init__(self, allowance: "Allowance", num_tokens: int):
        self._allowance = allowance
        self._num_tokens = num_tokens

    def settle(self, num_used: int) -> None:
        """Book what was used and give the rest back. Once."""
        self._allowance.settle(self._num_tokens, num_used)


class Allowance:
    """What one key may still use. None means without bound."""

    def __init__(
        self,
        name: str,
        usage: Usage,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name = name
        self._usage = usage
        self._max_tokens = max_tokens
        self._num_reserved = 0
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None

    def admit(self) -> None:
        """Count a request; raises `AllowanceError` where there were too many."""
        if self._requests is None:
            return
        wait_s = self._requests.seconds_until(1)
        if wait_s > 0:
            raise AllowanceError(
                f"this key may send {self._requests.per_minute} requests a minute",
                retry_after_s=wait_s,
            )
        self._requests.take(1)

    def reserve(self, num_tokens: int) -> Reservation:
        """Set tokens aside before a request runs; raises `AllowanceError` where too few are left.

        A request that is larger than a minute's worth waits for a full bucket, and empties it.
        """
        if self._max_tokens is not None:
            left = self._max_tokens - self._usage.of(self._name) - self._num_reserved
            if num_tokens > left:
                raise AllowanceError(
                    f"this key has {max(0, left)} of its {self._max_tokens} tokens left, and the "
                    f"request may need {num_tokens}",
                    retry_after_s=None,
                )
        if self._tokens is not None:
            wait_s = self._tokens.seconds_until(num_tokens)
            if wait_s > 0:
                raise AllowanceError(
                    f"this key may use {self._tokens.per_minute} tokens a minute, and the request "
                    f"may need {num_tokens}",
                    retry_after_s=wait_s,
                )
            self._tokens.take(num_tokens)
        self._num_reserved += num_tokens
        return Reservation(self, num_tokens)

    def settle(self, num_reserved: int, num_used: int) -> None:
        """See `Reservation.settle`."""
        self._num_reserved -= num_reserved
        if self._tokens is not None:
            self._tokens.take(num_used - num_reserved)
        if self._max_tokens is not None:
            self._usage.add(self._name, num_used)

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's response headers."""
        found: dict[str, str] = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                full_s = bucket.seconds_until(bucket.per_minute)
                found |= {
                    f"x-ratelimit-limit-{what}": str(bucket.per_minute),
                    f"x-ratelimit-remaining-{what}": str(max(0, math.floor(bucket.level))),
                    f"x-ratelimit-reset-{what}": f"{full_s:.3f}s",
                }
        return found


UNBOUNDED = Allowance("", Usage(None))
