"""KV blocks in a file: fixed slots, each with its content's name and a checksum. Knows no tensors.

A slot is written with one call and proves itself when it is read, so that a crash, a full disk or a
flipped bit costs a cached block and never a wrong answer. The file outlives the engine: whoever
opens it with the same fingerprint finds the blocks again.
"""

import fcntl
import hashlib
import logging
import os
import struct
from pathlib import Path

from octavo.errors import ConfigError

logger = logging.getLogger(__name__)

_MAGIC = b"octavo-kv-file-1"
_HEAD = struct.Struct("<16s32sQ")  # magic, fingerprint, bytes of a block
_SLOT = struct.Struct("<32sQ16s")  # key, number of the write, checksum of both and the content
_HEAD_BYTES = 4096
_KEY_BYTES = 32
_EMPTY = bytes(_SLOT.size)


class DiskFile:
    """A bounded file of KV blocks. Sole writer: the runner of one engine, which holds a lock on it.

    fingerprint: 32 bytes that differ whenever the blocks' meaning does (weights, dtype, layout); a
        file with another one is started afresh.

    Raises:
        ConfigError: the file cannot be opened, or another engine uses it.
    """

    def __init__(self, path: Path, *, num_slots: int, block_bytes: int, fingerprint: bytes):
        self.num_slots = num_slots
        self._block_bytes = block_bytes
        self._slot_bytes = _SLOT.size + block_bytes
        self._num_writes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"the KV file {path} cannot be opened ({error.strerror}); choose another with "
                "--kv-offloading-disk-path"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(
                f"another engine uses the KV file {path}; give each its own with "
                "--kv-offloading-disk-path"
            ) from error
        self._path = path
        self.adopt(fingerprint)

    def adopt(self, fingerprint: bytes) -> None:
        """What is written from now on has this meaning; what was there with another is dropped."""
        head = _HEAD.pack(_MAGIC, fingerprint, self._block_bytes)
        if os.pread(self._file, _HEAD.size, 0) != head:
            if os.fstat(self._file).st_size:
                logger.warning("the KV file %s is of another model or layout: emptied", self._path)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, head, 0)
        os.ftruncate(self._file, self._offset(self.num_slots))

    def keys(self) -> dict[int, bytes]:
        """Slot -> key of every slot in use, in the order in which they were written.

        Contents are not read here: a slot proves itself when it is wanted.
        """
        found: list[tuple[int, int, bytes]] = []
        for slot in range(self.num_slots):
            key, number, _ = _SLOT.unpack(os.pread(self._file, _SLOT.size, self._offset(slot)))
            if number:
                found.append((number, slot, key))
        found.sort()
        self._num_writes = found[-1][0] if found else 0
        return {slot: key for _, slot, key in found}

    def write(self, slot: int, key: bytes, content: memoryview) -> bool:
        """Fill a slot; False where the disk does not take it."""
        self._num_writes += 1
        number = self._num_writes
        head = _SLOT.pack(key, number, _checksum(key, number, content))
        try:
            written = os.pwritev(self._file, [head, content], self._offset(slot))
        except OSError:
            logger.warning("a KV block could not be written to disk", exc_info=True)
            return False
        return written == self._slot_bytes

    def read(self, slot: int, target: memoryview) -> bool:
        """Fetch a slot's content; False where it is damaged, and the slot is emptied then."""
        head = bytearray(_SLOT.size)
        try:
            num_read = os.preadv(self._file, [head, target], self._offset(slot))
        except OSError:
            logger.warning("a KV block could not be read from disk", exc_info=True)
            return False
        key, number, checksum = _SLOT.unpack(head)
        if num_read == self._slot_bytes and checksum == _checksum(key, number, target):
            return True
        logger.warning("KV block %d on disk is damaged: computed again", slot)
        os.pwrite(self._file, _EMPTY, self._offset(slot))
        return False

    def empty(self) -> None:
        """Drop every block, also for whoever opens the file later. Raises OSError."""
        os.ftruncate(self._file, _HEAD_BYTES)
        os.ftruncate(self._file, self._offset(self.num_slots))

    def close(self) -> None:
        """Give the file back; its blocks stay."""
        os.close(self._file)

    def _offset(self, slot: int) -> int:
        return _HEAD_BYTES + slot * self._slot_bytes


def _checksum(key: bytes, number: int, content: memoryview) -> bytes:
    digest = hashlib.blake2b(key + number.to_bytes(8, "little"), digest_size=16)
    digest.update(content)
    return digest.digest()
