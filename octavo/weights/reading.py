"""The one way to the tensors of a checkpoint, whatever its format."""

import torch

from octavo.config import Checkpoint, ModelConfig
from octavo.layers import Build
from octavo.models import create_model
from octavo.weights.loading import TensorStream, check_shapes
from octavo.weights.safetensors_files import open_safetensors


def read_tensors(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: torch.dtype
) -> TensorStream:
    """Open a checkpoint's weights: tensors under their Hugging Face names, as `dtype`, on the CPU.

    All headers are checked in this call, against the files and against the config, so whatever is
    truncated, lies, or does not belong together is refused before memory is allocated for the
    model. The stream then reads one tensor at a time: it needs the memory of the
    largest tensor in `dtype` (and once more for one that is stored as floats or reordered) and a
    few MiB; file pages are mapped and count as cache.

    Raises:
        CheckpointError: files are missing, truncated or damaged, or a tensor is missing,
            unexpected or of another shape than the config asks for.
        UnsupportedModelError: a format that is not read.
    """
    tensors = open_tensors(checkpoint, config, dtype=dtype)
    # The model itself says what it waits for. On this device a tensor is its shape alone, and the
    # whole takes half a millisecond a layer.
    model = create_model(config, Build("meta", dtype), max_positions=1)
    tensors = tensors.renamed(model.slot_name)
    check_shapes({name: slot.shape for name, slot in model.slots().items()}, tensors)
    return tensors


def open_tensors(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: torch.dtype
) -> TensorStream:
    """As `read_tensors`, whatever model the tensors are for."""
    if checkpoint.kind == "gguf":
        # Not at the head: a start waits for imports, and few need the `gguf` package.
        from octavo.weights.gguf_tensors import open_gguf

        return open_gguf(checkpoint, config, dtype)
    return open_safetensors(checkpoint, dtype)
