"""The tensors of a directory of safetensors files, single or sharded.

The `safetensors` library checks each header (size, types, offsets without gaps or overlaps, file
length) when the file is opened, before anything is allocated. This module owns which files belong
together, and refuses pickles.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.config import Checkpoint, excerpt
from octavo.config.checkpoint import PICKLES, pickle_refusal
from octavo.config.stored_tensors import DTYPES, INDEX, MAX_HEADER_BYTES, SINGLE
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.weights.loading import TensorStream, is_ignorable

MAX_NAME_CHARS = 128
SUB_BYTE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
BYTES_OF = {
    dtype: num_bytes
    for num_bytes, dtypes in (
        (1, "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0"),
        (2, "BF16 F16 I16 U16"),
        (4, "F32 I32 U32"),
        (8, "F64 I64 U64 C64"),
    )
    for dtype in dtypes.split()
}


def open_safetensors(checkpoint: Checkpoint, dtype: torch.dtype) -> TensorStream:
    """Check all files of the checkpoint's directory; read no data yet.

    Raises:
        CheckpointError: a file is missing, damaged or does not hold what the index says.
        UnsupportedModelError: weights in another format, or quantized.
    """
    folder = checkpoint.path
    weight_map = _weight_map(checkpoint)
    paths = _paths(folder, weight_map)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for path in paths:
        for name, shape in _header(path).items():
            if name in places:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {places[name].name}")
            shapes[name], places[name] = shape, path
    for name, file in weight_map.items():
        if name not in places or places[name].name != file:
            shown = excerpt(repr(name), MAX_NAME_CHARS)
            raise CheckpointError(f"{folder / INDEX}: tensor {shown} is not in {file!r}")

    def read() -> Iterator[tuple[str, Tensor]]:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in _names(file):
                    yield name, file.get_tensor(name).to(dtype)

    return TensorStream(str(folder), shapes, read)


def open_safetensors_file(path: Path, dtype: torch.dtype) -> TensorStream:
    """Check one file, which need not be a model's; read no data yet.

    Raises:
        CheckpointError: it is missing or damaged.
        UnsupportedModelError: its tensors are of types that are not read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    shapes = _header(path)

    def read() -> Iterator[tuple[str, Tensor]]:
        with safe_open(path, framework="pt") as file:
            for name in shapes:
                yield name, file.get_tensor(name).to(dtype)

    return TensorStream(str(path), shapes, read)


def _weight_map(checkpoint: Checkpoint) -> dict[str, str]:
    """{tensor: file} from the index; empty where there is a single file."""
    folder = checkpoint.path
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    weight_map = checkpoint.json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no 'weight_map'")
    for name, file in weight_map.items():
        # A plain name: no index may point out of its directory.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or Path(file).suffix != ".safetensors"
        ):
            raise CheckpointError(
                f"{folder / INDEX}: tensor {excerpt(repr(name), MAX_NAME_CHARS)} is in "
                f"{excerpt(repr(file), MAX_NAME_CHARS)}, no file of ours"
            )
    return weight_map


def _paths(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    paths = [folder / file for file in sorted(set(weight_map.values()))] or [folder / SINGLE]
    for path in paths:
        if path.is_file():
            continue
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
        if not weight_map and pickles:
            raise UnsupportedModelError(pickle_refusal(pickles[0]))
        raise CheckpointError(f"{path} is missing")
    return paths


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in one file."""
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in _names(file):
                if len(name) > MAX_NAME_CHARS:
                    raise CheckpointError(f"{path}: a tensor's name has {len(name)} characters")
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES and not is_ignorable(name):
                    raise UnsupportedModelError(
                        f"{path}: tensor {name!r} has the type {view.get_dtype()}; "
                        f"supported: {', '.join(DTYPES)}"
                    )
                shapes[name] = tuple(view.get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file: {_culprit(path)}{excerpt(error)}"
        ) from error
    return shapes


def _culprit(path: Path) -> str:
    """Which tensor a damaged header lies about, for an error: the library often does not say."""
    name = None
    try:
        with path.open("rb") as file:
            (num_header_bytes,) = struct.unpack("<Q", file.read(8))
            if num_header_bytes > MAX_HEADER_BYTES:
                return ""
            header = json.loads(file.read(num_header_bytes))
        num_data_bytes = path.stat().st_size - 8 - num_header_bytes
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] in SUB_BYTE_DTYPES:
                continue
            start, end = entry["data_offsets"]
            num_bytes = math.prod(entry["shape"]) * BYTES_OF[entry["dtype"]]
            if end - start != num_bytes or not 0 <= start <= end <= num_data_bytes:
                break
        else:
            return ""
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # Of the entry, unless there is none: not even a header that can be taken apart.
        if name is None or isinstance(error, OSError):
            return ""
    except struct.error:
        return ""
    return f"tensor {excerpt(repr(name), MAX_NAME_CHARS)}: "


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()  # safe_open's handle is no mapping and has no types
    return names
