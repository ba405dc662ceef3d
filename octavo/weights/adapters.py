"""LoRA adapters from PEFT's files: which tensors belong together, and whether they fit a model.

Knows no slots and no requests; the config beside the tensors is `octavo.config`'s to judge.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from octavo.config.adapter_files import WEIGHTS, module_of, read_adapter_config
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.layers import AdapterWeights
from octavo.weights.safetensors_files import open_safetensors_file


def read_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int,
    dtype: torch.dtype,
) -> AdapterWeights:
    """An adapter, on the host, with its scale in B.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves them.
        shapes: {module: (rows, columns)} of the weights that an adapter may change.
        max_rank: the largest that there is room for.
        dtype: of the model.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config or the model.
        UnsupportedModelError: it changes what no adapter can change here.
    """
    config = read_adapter_config(directory, max_rank=max_rank)
    tensors = open_safetensors_file(directory / WEIGHTS, torch.float32)
    halves = {module_of(name): name for name in tensors.shapes}
    modules = list(dict.fromkeys(module for module, _ in halves))
    if not modules:
        raise CheckpointError(f"{WEIGHTS} holds no tensors")
    for module in modules:
        if module not in shapes:
            raise UnsupportedModelError(
                f"{WEIGHTS}: it changes {module}, which the model does not have or which no "
                "adapter can change; those can that project queries, keys, values, attention's "
                "output, and a plain MLP's gate, up and down"
            )
        rows, columns = shapes[module]
        for letter, shape in (("A", (config.rank, columns)), ("B", (rows, config.rank))):
            name = halves.get((module, letter))
            if name is None:
                raise CheckpointError(f"{WEIGHTS}: {module} has no lora_{letter}.weight")
            if tensors.shapes[name] != shape:
                raise CheckpointError(
                    f"{WEIGHTS}: {name} has the shape {tensors.shapes[name]}, but the model and "
                    f"the config ask for {shape}"
                )
    found = {module_of(name): _finite(name, tensor) for name, tensor in tensors}
    return AdapterWeights(
        config.rank,
        {
            module: (found[module, "A"].to(dtype), (config.scale * found[module, "B"]).to(dtype))
            for module in modules
        },
    )


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{WEIGHTS}: tensor {name!r} holds NaN or infinity")
    return tensor
