"""The tensors of a directory of safetensors files, single or sharded.

The `safetensors` library checks each header (size, types, offsets without gaps or overlaps, file
length) when the file is opened, before anything is allocated. This module owns which files belong
together, and refuses pickles.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.config import Checkpoint
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.weights.loading import TensorStream

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32", "F64")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
            raise CheckpointError(f"{folder / INDEX}: tensor {name!r} is not in {file!r}")

    def read() -> Iterator[tuple[str, Tensor]]:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in _names(file):
                    yield name, file.get_tensor(name).to(dtype)

    return TensorStream(str(folder), shapes, read)


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
                f"{folder / INDEX}: tensor {name!r} is in {file!r}, no file of ours"
            )
    return weight_map


def _paths(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    paths = [folder / file for file in sorted(set(weight_map.values()))] or [folder / SINGLE]
    for path in paths:
        if path.is_file():
            continue
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if not weight_map and pickles:
            raise UnsupportedModelError(
                f"{folder} holds its weights in {pickles[0]}: pickles can run code and are never "
                "read. Convert them to safetensors"
            )
        raise CheckpointError(f"{path} is missing")
    return paths


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in one file."""
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in _names(file):
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UnsupportedModelError(
                        f"{path}: tensor {name!r} has the type {view.get_dtype()}; "
                        f"supported: {', '.join(DTYPES)}"
                    )
                shapes[name] = tuple(view.get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error
    return shapes


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()  # safe_open's handle is no mapping and has no types
    return names
