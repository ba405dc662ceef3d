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


def _q5_0(blocks: Tensor) -> Tensor:
    fifth_bits = _bits(blocks[:, 2:6], 8, 1).transpose(1, 2).flatten(1)
    return _nibbles(blocks[:, 6:]).add_(fifth_bits, alpha=16).sub_(16).mul_(_half(blocks, 0))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_by_parts(blocks, _bits(blocks[:, 16:].view(-1, 4, 32), 2, 4).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    numbers = _bits(blocks[:, 48:].view(-1, 4, 32), 2, 4).view(-1, 8, 32)
    return _scaled_by_parts(blocks, numbers.add_(_bits(blocks[:, 16:48], 8, 1), alpha=16))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].view(-1, 2, 64), 2, 4)  # [n, 2, 2, 64]: halves, nibbles
    high = _bits(blocks[:, 128:192].view(-1, 2, 32), 4, 2)  # [n, 2, 4, 32]
    numbers = low.view(-1, 2, 4, 32).add_(high, alpha=16).sub_(32).view(-1, 16, 16)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return numbers.mul_(scales[:, :, None]).flatten(1)


def _scaled_by_parts(blocks: Tensor, numbers: Tensor) -> Tensor:
    """numbers [n, 8, 32], each part with a scale and a minimum of 6 bits -> [n, 256]."""
    first, second, both = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # four parts each
    scales = torch.cat((first & 63, (both & 15) | (first >> 6 << 4)), 1).float()
    minima = torch.cat((second & 63, (both >> 4) | (second >> 6 << 4)), 1).float()
    scales.mul_(_half(blocks, 0))
    minima.mul_(_half(blocks, 2))
    return numbers.mul_(scales[:, :, None]).sub_(minima[:, :, None]).flatten(1)


def _bits(packed: Tensor, count: int, width: int) -> Tensor:
    """packed [n, ..., b] -> [n, ..., count, b] float32: numbers of `width` bits, lowest first."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8)
    return ((packed[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)).float()


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
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
