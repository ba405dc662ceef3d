"""ggml's number formats, turned into floating point.

A tensor is a row of blocks, each of a few bytes that hold scales and small integers. The common
formats are unpacked by torch, several times faster than by the `gguf` package and equal to it bit
for bit; the package does all others. Knows no files.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from octavo.errors import UnsupportedModelError

CHUNK_BLOCKS = 2**15  # of 32 numbers: 4 MiB as float32, which stays in the cache

Unpack = Callable[[Tensor], Tensor]  # [n, bytes of a block] uint8 -> [n, numbers of a block]


def block_sizes(ggml_type: int) -> tuple[int, int]:
    """(numbers in a block, bytes of a block) of a format, by ggml's id.

    Raises:
        UnsupportedModelError: no such format, or one that cannot be unpacked.
    """
    try:
        kind = GGMLQuantizationType(ggml_type)
        num_numbers, num_bytes = GGML_QUANT_SIZES[kind]
        if kind not in FLOATS and kind not in UNPACK:
            dequantize(np.zeros((1, num_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"the GGUF tensor type {_name(ggml_type)} is not supported"
        ) from error
    return num_numbers, num_bytes


def to_float(data: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Unpack the bytes of one tensor.

    Args:
        data: [number of bytes] uint8, a whole number of blocks. It is not kept.
        ggml_type: the format, which `block_sizes` accepts.
        dtype: of the result. Numbers are unpacked to float32 and rounded to it.

    Returns:
        [number of numbers] in new memory. Beside it only a few MiB are used.
    """
    kind = GGMLQuantizationType(ggml_type)
    if kind in FLOATS:
        # Cloned because a view would depend on the file's alignment, and on the file.
        return data.clone().view(FLOATS[kind]).to(dtype)
    num_numbers, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = data.view(-1, num_bytes)
    numbers = torch.empty(len(blocks), num_numbers, dtype=dtype)
    unpack = UNPACK.get(kind) or _by_package(kind)
    step = CHUNK_BLOCKS * 32 // num_numbers
    for start in range(0, len(blocks), step):
        numbers[start : start + step] = unpack(blocks[start : start + step])
    return numbers.view(-1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _half(blocks: Tensor, offset: int) -> Tensor:
    """[n, 1] float32: the float16 at byte `offset` of each block."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, 2 * b] float32: the low halves of b bytes, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1).float()


def _by_package(kind: GGMLQuantizationType) -> Unpack:
    return lambda blocks: torch.from_numpy(dequantize(blocks.numpy(), kind))


def _name(ggml_type: int) -> str:
    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    return known.get(ggml_type, str(ggml_type))


FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
UNPACK: dict[GGMLQuantizationType, Unpack] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
