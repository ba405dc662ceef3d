"""The head of a GGUF file: metadata and tensor positions, read without torch, numpy or `gguf`.

The `gguf` package makes a numpy view of every string, which takes seconds for a vocabulary; this
reader takes tens of milliseconds. It trusts nothing: every count and length is held against the
bytes that are left, and every tensor must begin inside the file. It knows neither what the keys
mean nor how many bytes a tensor type takes (`weights` does).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import CheckpointError, UnsupportedModelError

MetaValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20  # the largest real ones, with 256k tokens and merges, take 15 MiB
MAX_VALUES = 2**23  # in all arrays together; the largest vocabularies have 2 million
MAX_NAME_CHARS = 128  # of a key or a tensor; ggml's own limit for tensors is 64
MAX_DIMS = 4  # ggml's own limit
MAX_ELEMENTS = 2**40
DEFAULT_ALIGNMENT = 32

STRING = 8
ARRAY = 9
SCALAR_FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # by GGUF type id
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. Its length in bytes follows from `ggml_type` and `shape`."""

    name: str
    shape: tuple[int, ...]  # as torch has it: rows first
    ggml_type: int
    offset: int  # bytes from the beginning of the file


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All of a GGUF file but the tensors' data."""

    metadata: Mapping[str, MetaValue]
    tensors: Mapping[str, GgufTensor]
    num_file_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the head of the GGUF file at `path`.

    Raises:
        CheckpointError: not a GGUF file, truncated, or lying about a count, length or position.
        UnsupportedModelError: a version or byte order that is not read.
    """
    try:
        with path.open("rb") as file:
            num_file_bytes = path.stat().st_size
            if num_file_bytes < 24:
                raise CheckpointError(f"{path}: {num_file_bytes} bytes are no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data, num_file_bytes).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Cursor:
    """Reads forward through the head of one file."""

    def __init__(self, path: Path, data: mmap.mmap, num_file_bytes: int):
        self._path = path
        self._data = data
        self._num_file_bytes = num_file_bytes
        self._end = min(num_file_bytes, MAX_HEADER_BYTES)
        self._offset = 0
        self._num_values = 0  # in arrays, so far

    def header(self) -> GgufHeader:
        try:
            num_tensors, num_entries = self._preamble()
            metadata = self._metadata(num_entries)
            tensors = self._tensors(num_tensors, metadata)
        except struct.error as error:
            raise self._damaged("it ends in the middle of its header") from error
        except UnicodeDecodeError as error:
            raise self._damaged("its header holds a string that is not UTF-8") from error
        return GgufHeader(metadata, tensors, self._num_file_bytes)

    def _preamble(self) -> tuple[int, int]:
        if self._data[:4] != MAGIC:
            raise self._damaged("it does not begin with 'GGUF'")
        self._offset = 4
        version = self._u32()
        if version not in SUPPORTED_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in SUPPORTED_VERSIONS else f"has version {version}"
            raise UnsupportedModelError(
                f"{self._path}: the GGUF file {what}; little-endian versions 2 and 3 are supported"
            )
        return self._u64(), self._u64()

    def _metadata(self, num_entries: int) -> dict[str, MetaValue]:
        self._expect(num_entries, 13, "metadata entries")
        metadata: dict[str, MetaValue] = {}
        for _ in range(num_entries):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"the metadata key {key!r} occurs twice")
            metadata[key] = self._value(key, self._u32())
        return metadata

    def _value(self, key: str, kind: int) -> MetaValue:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array(key)
        scalar: MetaValue = self._scalars(key, kind, 1)[0]
        return scalar

    def _array(self, key: str) -> MetaValue:
        kind, count = self._u32(), self._u64()
        self._num_values += count
        if self._num_values > MAX_VALUES:
            raise self._damaged(f"with {key!r} its arrays have {self._num_values} values")
        if kind == STRING:
            self._expect(count, 8, f"strings of {key!r}")
            return self._strings(count)
        return list(self._scalars(key, kind, count))

    def _scalars(self, key: str, kind: int, count: int) -> tuple[bool | int | float, ...]:
        code = SCALAR_FORMATS.get(kind)
        if code is None:
            raise self._damaged(f"the metadata key {key!r} has the unknown type {kind}")
        size = struct.calcsize(f"<{code}")
        self._expect(count, size, f"values of {key!r}")
        values = struct.unpack_from(f"<{count}{code}", self._data, self._offset)
        self._offset += count * size
        return values

    def _tensors(self, count: int, metadata: Mapping[str, MetaValue]) -> dict[str, GgufTensor]:
        self._expect(count, 24, "tensors")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        # True is an int to Python, and no power of two that anyone meant.
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged("general.alignment is no power of two")
        found = [self._tensor() for _ in range(count)]
        data_start = -(-self._offset // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, ggml_type, relative in found:
            offset = data_start + relative
            if name in tensors:
                raise self._damaged(f"the tensor {name!r} occurs twice")
            if offset >= self._num_file_bytes:
                raise self._damaged(
                    f"the tensor {name!r} begins at byte {offset}, but the file has "
                    f"{self._num_file_bytes} bytes: it is truncated"
                )
            tensors[name] = GgufTensor(name, shape, ggml_type, offset)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name()
        num_dims = self._u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._damaged(f"the tensor {name!r} has {num_dims} dimensions")
        shape = tuple(self._u64() for _ in range(num_dims))[::-1]
        num_elements = 1
        for size in shape:
            num_elements *= size
        if not 1 <= num_elements <= MAX_ELEMENTS:
            raise self._damaged(f"the tensor {name!r} has the impossible shape {shape}")
        return name, shape, self._u32(), self._u64()

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self._data, self._offset)
        self._offset += 4
        return int(value)

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self._data, self._offset)
        self._offset += 8
        return int(value)

    def _name(self) -> str:
        name = self._string()
        if len(name) > MAX_NAME_CHARS:
            raise self._damaged(f"a name in its header has {len(name)} characters")
        return name

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, offset, end = self._data, self._offset, self._end
        unpack = _U64.unpack_from
        strings = []
        for _ in range(count):
            (length,) = unpack(data, offset)
            start = offset + 8
            offset = start + length
            if offset > end:
                raise self._damaged(f"a string of {length} bytes runs past the end of the header")
            strings.append(data[start:offset].decode())
        self._offset = offset
        return strings

    def _expect(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._end - self._offset:
            raise self._damaged(f"it announces {count} {what}, more than it has room for")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: damaged GGUF file: {reason}")
