"""paged_attention: the reference against torch's own attention, the compiled against both."""

from __future__ import annotations

import pytest
import torch
from kernels.pages import Pages
from torch import Tensor

from octavo.kernels import PAGED_ATTENTION, AttentionBatch, Case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HEADS = [(4, 4, 64), (9, 3, 64), (8, 2, 128), (8, 1, 80), (3, 1, 96), (2, 1, 256), (64, 1, 16)]


def compiled(dtype: torch.dtype, dim: int):
    choice = PAGED_ATTENTION.select(Case("cpu", dtype, {"head_dim": dim, "block_size": 16}))
    assert choice.name == "native"
    return choice.function


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


MIXED = [(1, 1), (1, 15), (1, 16), (1, 17), (5, 5), (40, 100), (16, 16), (0, 9), (70, 75), (3, 65)]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_the_reference_equals_torch(dtype, heads, kv_heads, dim, block_size):
    pages = Pages(MIXED, heads, kv_heads, dim, dtype, block_size)
    ours = PAGED_ATTENTION.reference(pages.query, pages.kv_cache, pages.batch, dim**-0.5)
    close(ours, pages.expected(dim**-0.5))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_a_mixed_batch(isa, dtype, heads, kv_heads, dim):
    pages = Pages(MIXED, heads, kv_heads, dim, dtype)
    ours = compiled(dtype, dim)(pages.query, pages.kv_cache, pages.batch, 0.2)
    assert ours.is_contiguous()
    close(ours, pages.expected(0.2))


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1000)],  # one long decode: its context is split among threads
        [(1, 1037), (1, 3)],  # split, though one sequence has nothing to split
        [(1, 250)] * 32,
        [(1024, 1024)],
        [(100, 1500)],  # a later chunk of a chunked prefill
        [(2, 700)],
    ],
    ids=str,
)
def test_long_contexts(isa, dtype, lengths):
    pages = Pages(lengths, 9, 3, 64, dtype)
    ours = compiled(dtype, 64)(pages.query, pages.kv_cache, pages.batch, 0.125)
    close(ours, pages.expected(0.125))


def test_large_scores_do_not_overflow(isa, dtype):
    pages = Pages([(20, 200), (1, 900)], 4, 2, 64, dtype)
    ours = compiled(dtype, 64)(pages.query, pages.kv_cache, pages.batch, 30.0)
    expected = pages.expected(30.0)
    # bf16 inputs are exact in both; what differs is the order of fp32 sums, times the scale.
    torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)


def test_an_empty_batch(isa, dtype):
    pages = Pages([(0, 5)], 4, 2, 64, dtype)
    ours = compiled(dtype, 64)(pages.query, pages.kv_cache, pages.batch, 1.0)
    assert ours.shape == (0, 4, 64)


def test_a_batch_refuses_what_kernels_would_misread():
    starts, lengths, tables = (torch.zeros(shape).int() for shape in ((3,), (2,), (2, 4)))
    for wrong in (
        (starts.long(), lengths, tables),
        (starts[:2], lengths, tables),
        (starts, lengths, tables[:1]),
        (starts, lengths, torch.zeros(4, 2).int().t()),
    ):
        with pytest.raises(ValueError, match="int32"):
            AttentionBatch(*wrong, max_query_len=1, max_context_len=1)


def test_it_refuses_what_it_would_misread(isa):
    attention = compiled(torch.float32, 64)
    pages = Pages([(2, 20)], 4, 2, 64, torch.float32)
    query, cache, batch = pages.query, pages.kv_cache, pages.batch
    with pytest.raises(ValueError, match="16"):
        attention(query, cache[:, :, :, :8], batch, 1.0)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        attention(query[:, :3], cache, batch, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        attention(query.bfloat16(), cache, batch, 1.0)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_dim": 72}, "head sizes"),
        ({"head_dim": 512}, "head sizes"),
        ({"head_dim": 64, "block_size": 32}, "blocks of 16"),
        ({"head_dim": 64, "num_heads": 97, "num_kv_heads": 1}, "query heads"),
    ],
)
def test_cases_left_to_the_reference_say_why(sizes, reason):
    choice = PAGED_ATTENTION.select(Case("cpu", torch.bfloat16, sizes))
    assert choice.name == "reference"
    assert reason in str(choice)
