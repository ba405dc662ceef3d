"""paged_attention: the reference against torch's own attention, the compiled against both."""

from __future__ import annotations

import pytest
import torch
from kernels.pages import Pages
from torch import Tensor

from octavo.kernels import PAGED_ATTENTION, AttentionBatch, AttentionKind, Case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HEADS = [(4, 4, 64), (9, 3, 64), (8, 2, 128), (8, 1, 80), (3, 1, 96), (2, 1, 256), (64, 1, 16)]


def compiled(dtype: torch.dtype, dim: int, **sizes: int):
    case = Case("cpu", dtype, {"head_dim": dim, "block_size": 16, **sizes})
    choice = PAGED_ATTENTION.select(case)
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


KINDS = [
    AttentionKind(window=1),
    AttentionKind(window=7),
    AttentionKind(window=16),
    AttentionKind(window=50),
    AttentionKind(window=300),
    AttentionKind(window=10**6),
    AttentionKind(softcap=1.5),
    AttentionKind(window=33, softcap=20.0),
    AttentionKind(causal=False),
    AttentionKind(causal=False, softcap=2.0),
]
OF_ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
# Windows begin within blocks, at their edges, in the chunk of 256 tokens before, and two before it.
OF_WINDOWS = [*MIXED, (1, 300), (1, 1037), (90, 560), (20, 513), (2, 256), (1, 257)]


@OF_ALL_KINDS
@pytest.mark.parametrize("block_size", [16, 24])
def test_every_kind_in_the_reference(dtype, kind, block_size):
    pages = Pages(OF_WINDOWS, 4, 2, 32, dtype, block_size, kind=kind)
    ours = PAGED_ATTENTION.reference(pages.query, pages.kv_cache, pages.batch, 0.5, kind)
    close(ours, pages.expected(0.5))


@OF_ALL_KINDS
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (9, 3, 80), (64, 1, 16)])
def test_every_kind_compiled(isa, dtype, kind, heads, kv_heads, dim):
    pages = Pages(OF_WINDOWS, heads, kv_heads, dim, dtype, kind=kind)
    attention = compiled(dtype, dim, **kind.sizes())
    ours = attention(pages.query, pages.kv_cache, pages.batch, 0.3, kind)
    close(ours, pages.expected(0.3))


def test_a_window_of_a_single_long_decode_is_cut_among_threads(isa, dtype):
    kind = AttentionKind(window=900)
    pages = Pages([(1, 3000)], 2, 1, 64, dtype, kind=kind)
    ours = compiled(dtype, 64)(pages.query, pages.kv_cache, pages.batch, 0.125, kind)
    close(ours, pages.expected(0.125))


def test_a_window_gives_a_query_the_same_bits_however_its_prompt_is_cut(isa, dtype):
    """In pieces the blocks that are left out are others."""
    kind = AttentionKind(window=70, softcap=3.0)
    pages = Pages([(600, 600)], 4, 2, 64, dtype, kind=kind)
    attention = compiled(dtype, 64)
    whole = attention(pages.query, pages.kv_cache, pages.batch, 0.2, kind)
    pieces = []
    for first, stop in ((0, 1), (1, 40), (40, 333), (333, 335), (335, 600)):
        starts, lengths = torch.tensor([0, stop - first]).int(), torch.tensor([stop]).int()
        piece = AttentionBatch(starts, lengths, pages.batch.block_tables, stop - first, stop)
        pieces.append(attention(pages.query[first:stop], pages.kv_cache, piece, 0.2, kind))
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"window": 4, "causal": False}, {"softcap": 0.0}], ids=str
)
def test_a_kind_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="window|softcap"):
        AttentionKind(**wrong)


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
