"""What tensors a checkpoint holds, from the heads of its files: names, shapes, types and bytes.

For people who look at a model (`octavo inspect`), whose files may lie on the hub and stay there.
Whoever loads it reads them through their libraries, which check more (`octavo.weights`). Knows no
torch; reads no data.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from octavo.config.checkpoint import Checkpoint, excerpt
from octavo.config.gguf_header import GgufTensor
from octavo.errors import CheckpointError, ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES = ("BF16", "F16", "F32", "F64")  # of safetensors: those that are loaded


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file has it."""

    name: str
    shape: tuple[int, ...]  # rows first
    dtype: str  # as safetensors ("BF16") or ggml ("Q4_K") calls it
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


def stored_tensors(checkpoint: Checkpoint) -> tuple[tuple[StoredTensor, ...], tuple[str, ...]]:
    """(the tensors of all files, in their order; what is wrong with files that cannot be read)"""
    try:
        if checkpoint.kind == "gguf":
            return tuple(map(_of_gguf, checkpoint.gguf.tensors.values())), ()
        paths = _paths(checkpoint)
    except ModelError as error:
        return (), (str(error),)
    tensors: list[StoredTensor] = []
    problems = []
    for path in paths:
        try:
            remote = checkpoint.commit is not None and not path.is_file()
            tensors += _of_hub(checkpoint, path.name) if remote else _of_safetensors(path)
        except CheckpointError as error:
            problems.append(str(error))
    others = Counter(tensor.dtype for tensor in tensors if tensor.dtype not in DTYPES)
    for dtype, count in others.items():
        problems.append(f"{count:,} tensors have the type {dtype}; supported: {', '.join(DTYPES)}")
    return tuple(tensors), tuple(problems)


def _paths(checkpoint: Checkpoint) -> list[Path]:
    folder = checkpoint.path
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return [folder / SINGLE]
    weight_map = checkpoint.json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no 'weight_map'")
    # A plain name: no index may point out of its directory.
    return [folder / Path(str(file)).name for file in sorted(set(map(str, weight_map.values())))]


def _of_safetensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file, in the order of their data."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            (num_header_bytes,) = struct.unpack("<Q", file.read(8))
            if num_header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {num_header_bytes} bytes")
            header: dict[str, Any] = json.loads(file.read(num_header_bytes))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = [
            StoredTensor(
                str(name),
                tuple(map(int, entry["shape"])),
                str(entry["dtype"]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
        ]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {excerpt(error)}") from error
    except struct.error as error:
        raise CheckpointError(f"{path}: damaged safetensors file: no header") from error
    return iter(found)


def _of_hub(checkpoint: Checkpoint, file: str) -> Iterator[StoredTensor]:
    """The tensors of a file that is not here: the hub is asked for its first bytes."""
    # Imported here because it takes 0.2 s, which the models on this machine need not pay.
    from huggingface_hub import HfApi

    try:
        head = HfApi().parse_safetensors_file_metadata(
            checkpoint.name, file, revision=checkpoint.commit
        )
    except Exception as error:  # the HTTP library's own classes, which differ between versions
        reason = f"{type(error).__name__}: {excerpt(error)}"
        raise CheckpointError(f"the head of {file} cannot be had from the hub: {reason}") from error
    for name, info in head.tensors.items():
        start, end = info.data_offsets
        yield StoredTensor(name, tuple(info.shape), str(info.dtype), end - start)


def _of_gguf(tensor: GgufTensor) -> StoredTensor:
    # Its table of types is worth 0.1 s where somebody looks, and numpy that comes with it.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
    except ValueError as error:
        raise CheckpointError(
            f"tensor {tensor.name!r} has the type {tensor.ggml_type}, which ggml does not know"
        ) from error
    num_numbers, num_bytes = GGML_QUANT_SIZES[kind]
    total = prod(tensor.shape) // num_numbers * num_bytes
    return StoredTensor(tensor.name, tensor.shape, kind.name, total)
