"""ggml's number formats: our unpacking equals the gguf package's, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from octavo.errors import UnsupportedModelError
from octavo.weights import ggml_types
from octavo.weights.ggml_types import block_sizes, to_float

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
ALL += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"]


def random_blocks(kind, num_blocks, seed=0):
    """Blocks of random bytes whose floats are finite."""
    _, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (num_blocks, num_bytes), np.uint8)
    # Clearing an exponent bit in every byte that can end a float16 keeps scales finite.
    return blocks & 0xBF if kind.name not in ("F32", "BF16") else blocks & 0x3F


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_equals_the_package(name, dtype):
    kind = GGMLQuantizationType[name]
    blocks = random_blocks(kind, 67)
    expected = torch.from_numpy(dequantize(blocks, kind)).to(dtype).view(-1)
    actual = to_float(torch.from_numpy(blocks).view(-1), int(kind), dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q6_K", "Q2_K"])
def test_tensors_of_several_chunks(name, monkeypatch):
    kind = GGMLQuantizationType[name]
    blocks = random_blocks(kind, 100)
    monkeypatch.setattr(ggml_types, "CHUNK_BLOCKS", 24)
    expected = torch.from_numpy(dequantize(blocks, kind)).view(-1)
    actual = to_float(torch.from_numpy(blocks).view(-1), int(kind), torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_the_result_is_new_memory(name):
    kind = GGMLQuantizationType[name]
    data = torch.zeros(64 * GGML_QUANT_SIZES[kind][1], dtype=torch.uint8)
    for dtype in DTYPES:
        to_float(data, int(kind), dtype).fill_(1)
    assert not data.any()


def test_data_need_not_be_aligned():
    data = torch.arange(0, 41, dtype=torch.uint8)[1:]
    aligned = data.clone()
    assert torch.equal(to_float(data, 0, torch.float32), aligned.view(torch.float32))


@pytest.mark.parametrize("name", ALL)
def test_block_sizes(name):
    kind = GGMLQuantizationType[name]
    assert block_sizes(int(kind)) == GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize(("ggml_type", "name"), [(9999, "9999"), (26, "I32"), (9, "Q8_1")])
def test_unsupported_types_are_named(ggml_type, name):
    with pytest.raises(UnsupportedModelError, match=name):
        block_sizes(ggml_type)
