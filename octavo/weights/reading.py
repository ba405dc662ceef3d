"""The one way to the tensors of a checkpoint, whatever its format."""

import torch

from octavo.config import Checkpoint, ModelConfig
from octavo.weights.loading import TensorStream
from octavo.weights.safetensors_files import open_safetensors


def read_tensors(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: torch.dtype
) -> TensorStream:
    """Open a checkpoint's weights: tensors under their Hugging Face names, as `dtype`, on the CPU.

    All headers are checked in this call, so a truncated or lying file is refused before memory is
    allocated for the model. The stream then reads one tensor at a time: it needs the memory of the
    largest tensor in `dtype` (and once more for one that is stored as floats or reordered) and a
    few MiB; file pages are mapped and count as cache.

    Raises:
        CheckpointError: files are missing, truncated or damaged.
        UnsupportedModelError: a format that is not read.
    """
    if checkpoint.kind == "gguf":
        # Not at the head: a start waits for imports, and few need the `gguf` package.
        from octavo.weights.gguf_tensors import open_gguf

        return open_gguf(checkpoint, config, dtype)
    return open_safetensors(checkpoint, dtype)
