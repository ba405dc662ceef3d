"""Who may ask for what: API keys, their scopes, and the file that lists them.

A key is kept as its SHA-256 alone, which suffices for 256 random bits: nothing can be guessed from
it. Knows no HTTP and no routes.
"""

import enum
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from octavo.errors import ConfigError
from octavo.server.allowance import Allowance, Usage
from octavo.server.config import ServerConfig

logger = logging.getLogger(__name__)

KEY_PREFIX = "octavo-"
RELOAD_INTERVAL_S = 1.0  # how soon a change of the file is noticed

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_.@-]+$")]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Positive = Annotated[int, msgspec.Meta(gt=0)]


class Scope(enum.StrEnum):
    """What a route is for, and what a key is good for."""

    PUBLIC = "public"  # routes only: liveness, for probes that have no key
    INFERENCE = "inference"
    METRICS = "metrics"  # what watches: metrics, readiness, versions
    ADMIN = "admin"  # what changes the server, or shows other people's requests


ALL_SCOPES = (Scope.INFERENCE, Scope.METRICS, Scope.ADMIN)


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key in the file, `[[keys]]`.

    tenant: whose share of the engine its requests use, and whose cached prefixes they find. Without
        one, a key finds only prefixes of its own.
    requests_per_minute, tokens_per_minute: how much at once, and how fast it comes back.
    max_tokens: of prompts and answers together, in all.
    """

    name: _Name
    sha256: _Digest
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    tenant: _Name | None = None
    requests_per_minute: _Positive | None = None
    tokens_per_minute: _Positive | None = None
    max_tokens: _Positive | None = None


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[KeyEntry]


class ApiKey:
    """A key that somebody has sent, and what is left of its allowance."""

    def __init__(self, entry: KeyEntry, allowance: Allowance):
        self.entry = entry
        self.scopes = frozenset(entry.scopes)
        self.allowance = allowance


def new_key() -> tuple[str, str]:
    """A fresh key, to be shown once, and its digest, to be kept."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, digest_of(key.encode())


def digest_of(key: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def read_key_file(path: Path) -> list[KeyEntry]:
    """All entries of a file.

    Raises:
        ConfigError: it cannot be read, is no TOML, or an entry is wrong; the message says which.
    """
    try:
        entries = msgspec.toml.decode(path.read_bytes(), type=_KeyFile).keys
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the key file {path} is wrong: {error}") from None
    for what in ("name", "sha256"):
        values = [getattr(entry, what) for entry in entries]
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"the key file {path} has two keys with the {what} {value}")
    for entry in entries:
        if Scope.PUBLIC in entry.scopes or not entry.scopes:
            scopes = ", ".join(ALL_SCOPES)
            raise ConfigError(f"the key {entry.name} in {path} needs scopes out of: {scopes}")
    return entries


class KeyRing:
    """All keys of a server. Empty means that everything is open.

    The file is read again when it changes, so that a key can be revoked while the server runs. A
    file that is wrong by then changes nothing, and is complained of.
    """

    def __init__(self, config: ServerConfig, *, clock: Callable[[], float] = time.monotonic):
        self.is_open = config.is_open
        self._clock = clock
        self._file = None if config.api_key_file is None else Path(config.api_key_file)
        usage_file = None if config.usage_file is None else Path(config.usage_file)
        self.usage = Usage(usage_file)
        self._fixed: list[KeyEntry] = []
        if config.api_key is not None:
            digest = digest_of(config.api_key.encode())
            self._fixed = [KeyEntry(name="api_key", sha256=digest, scopes=ALL_SCOPES)]
        self._keys: dict[str, ApiKey] = {}  # by digest
        self._stamp = self._file_stamp()
        self._next_look_s = clock() + RELOAD_INTERVAL_S
        self._take(read_key_file(self._file) if self._file else [])

    def find(self, presented: bytes) -> ApiKey | None:
        """The key that was sent, or None. Takes as long whichever it is."""
        self._look_at_file()
        digest, found = digest_of(presented), None
        for known, key in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def _take(self, entries: Iterable[KeyEntry]) -> None:
        """Make these the keys; who was there before and is no different keeps what is left."""
        before, self._keys = self._keys, {}
        for entry in [*self._fixed, *entries]:
            old = before.get(entry.sha256)
            if old is not None and old.entry == entry:
                self._keys[entry.sha256] = old
                continue
            allowance = Allowance(
                entry.name,
                self.usage,
                requests_per_minute=entry.requests_per_minute,
                tokens_per_minute=entry.tokens_per_minute,
                max_tokens=entry.max_tokens,
                clock=self._clock,
            )
            self._keys[entry.sha256] = ApiKey(entry, allowance)

    def _file_stamp(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _look_at_file(self) -> None:
        if self._file is None or self._clock() < self._next_look_s:
            return
        self._next_look_s = self._clock() + RELOAD_INTERVAL_S
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_key_file(self._file))
        except ConfigError as error:
            logger.error("keys stay as they were: %s", error)
        else:
            logger.info("the key file was read again: %d keys", len(self._keys))
