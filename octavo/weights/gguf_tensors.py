"""The tensors of a GGUF file under their Hugging Face names and in their Hugging Face order.

Every position and size is checked against the file before anything is read. Number formats are
`ggml_types`' business, and what llama.cpp's converter did is written in `gguf_layouts`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.config import AttentionConfig, Checkpoint, ModelConfig
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.weights.ggml_types import block_sizes, to_float
from octavo.weights.gguf_layouts import LAYOUTS
from octavo.weights.loading import TensorStream

# Factors of the rotary frequencies: `Checkpoint.config` has read them into the config.
SKIPPED = {"rope_freqs.weight"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: where its bytes are and what to do with them."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int  # bytes from the beginning of the file
    end: int
    num_heads: int | None  # set where the rows are in llama.cpp's rotary order
    offset: float  # what the converter added


def open_gguf(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> TensorStream:
    """Check the file's table of tensors; read nothing else yet.

    Raises:
        CheckpointError: a tensor does not fit into the file, or two overlap.
        UnsupportedModelError: a number format that cannot be unpacked.
    """
    path = checkpoint.path
    layout = LAYOUTS[str(checkpoint.gguf.metadata["general.architecture"])]
    entries: dict[str, _Entry] = {}
    for tensor in checkpoint.gguf.tensors.values():
        if tensor.name in SKIPPED:
            continue
        try:
            block_len, block_bytes = block_sizes(tensor.ggml_type)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: tensor {tensor.name!r}: {error}") from error
        num_numbers = 1
        for size in tensor.shape:
            num_numbers *= size
        if tensor.shape[-1] % block_len:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} of shape {tensor.shape} cannot be cut into "
                f"blocks of {block_len}"
            )
        end = tensor.offset + num_numbers // block_len * block_bytes
        if end > checkpoint.gguf.num_file_bytes:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} ends at byte {end}, but the file has "
                f"{checkpoint.gguf.num_file_bytes} bytes: it is truncated"
            )
        name = layout.hf_name(tensor.name)
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name!r} occurs twice, as {tensor.name!r} too")
        heads = _rotary_heads(name, config) if layout.pairs_are_neighbours else None
        if heads is not None and tensor.shape[0] != heads * _attention(config).head_dim:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} has {tensor.shape[0]} rows, but the config asks "
                f"for {heads} heads of {_attention(config).head_dim}"
            )
        offset = layout.norm_offset if name.endswith("norm.weight") else 0.0
        entries[name] = _Entry(tensor.shape, tensor.ggml_type, tensor.offset, end, heads, offset)
    in_order = sorted(entries.items(), key=lambda item: item[1].start)
    for (name, entry), (next_name, next_entry) in itertools.pairwise(in_order):
        if entry.end > next_entry.start:
            raise CheckpointError(f"{path}: tensors {name!r} and {next_name!r} overlap")

    def read() -> Iterator[tuple[str, Tensor]]:
        # A private mapping: pages come in as they are touched and can be dropped again.
        file = torch.from_file(
            str(path), shared=False, size=checkpoint.gguf.num_file_bytes, dtype=torch.uint8
        )
        for name, entry in in_order:
            yield name, _read_entry(file, entry, dtype)

    return TensorStream(str(path), {name: e.shape for name, e in entries.items()}, read)


def _read_entry(file: Tensor, entry: _Entry, dtype: torch.dtype) -> Tensor:
    data = file[entry.start : entry.end]
    if entry.offset:  # taken off before the numbers are rounded
        numbers = to_float(data, entry.ggml_type, torch.float32) - entry.offset
        return numbers.to(dtype).view(entry.shape)
    flat = to_float(data, entry.ggml_type, dtype)
    if entry.num_heads is None:
        return flat.view(entry.shape)
    # llama.cpp rotates neighbours (0, 1), (2, 3)...; Hugging Face rotates the first half of a head
    # with the second. [heads, pairs, 2, ...] -> [heads, 2, pairs, ...]
    num_pairs = entry.shape[0] // entry.num_heads // 2
    pairs = flat.view(entry.num_heads, num_pairs, 2, *entry.shape[1:])
    return pairs.transpose(1, 2).reshape(entry.shape)


def _rotary_heads(name: str, config: ModelConfig) -> int | None:
    if ".q_proj." in name:
        return _attention(config).num_heads
    return _attention(config).num_kv_heads if ".k_proj." in name else None


def _attention(config: ModelConfig) -> AttentionConfig:
    """The same in all layers, for the architectures whose rows are in another order."""
    return config.layers[0].attention
