"""Triton's paged attention against torch: in Triton's interpreter, or on the GPU if there is one.

The interpreter cannot multiply bf16 matrices; `tests/gpu` does.
"""

from __future__ import annotations

import pytest
import torch
from kernels.pages import Pages

pytest.importorskip("triton")

from octavo.kernels import PAGED_ATTENTION, AttentionBatch, AttentionKind, Case
from octavo.kernels import triton_decode_attention as module
from octavo.kernels.triton_paged_attention import (
    triton_invariant_paged_attention,
    triton_paged_attention,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
MIXED = [(1, 1), (1, 15), (1, 16), (1, 17), (5, 5), (16, 16), (0, 9), (20, 27), (3, 65), (1, 150)]
HEADS = [(6, 2, 64), (2, 2, 80), (5, 1, 128), (1, 1, 256), (20, 1, 24)]


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch):
    """So that contexts of a few hundred tokens have several parts, of more than one length."""
    monkeypatch.setattr(module, "SPLIT_LEN", 256)
    monkeypatch.setattr(module, "MAX_SPLITS", 2)
    yield
    for arrivals in module._arrivals_of.values():
        assert not arrivals.any(), "what a launch counts with is zero again after it"


def check(pages: Pages, scale: float, tolerance: float | None = None) -> None:
    ours = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, scale, pages.kind)
    assert ours.is_contiguous()
    tolerance = tolerance or TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), pages.expected(scale), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_a_mixed_batch(poisoned, heads, kv_heads, dim):
    check(Pages(MIXED, heads, kv_heads, dim, torch.float32, device=DEVICE), 0.2)


KINDS = [
    AttentionKind(window=1),
    AttentionKind(window=33, softcap=1.5),
    AttentionKind(window=270),
    AttentionKind(softcap=2.0),
    AttentionKind(causal=False),
]
OF_ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)


@OF_ALL_KINDS
def test_every_kind(poisoned, kind):
    """Decodes, whose windows begin in any split of the context, and prompts."""
    pages = Pages(
        MIXED + [(1, 600), (2, 300), (40, 130)], 6, 2, 32, torch.float32, 16, DEVICE, kind
    )
    check(pages, 0.2)
    ours = triton_invariant_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.2, kind)
    torch.testing.assert_close(ours, pages.expected(0.2), rtol=1e-5, atol=1e-5)


def test_a_window_is_looked_up_in_blocks_of_any_size(poisoned):
    kind = AttentionKind(window=45)
    check(Pages([(1, 200), (30, 150)], 4, 2, 32, torch.float32, 8, DEVICE, kind), 0.2)
    check(Pages([(1, 200), (30, 150)], 4, 2, 32, torch.float32, 48, DEVICE, kind), 0.2)


def test_a_window_has_the_same_bits_alone_and_in_a_batch(monkeypatch):
    kind = AttentionKind(window=260, softcap=3.0)
    pages = Pages(MIXED + [(1, 900), (1, 513)], 4, 2, 32, torch.float32, 16, DEVICE, kind)
    together = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.2, kind)
    assert torch.equal(together, torch.cat(one_by_one(pages)))
    monkeypatch.setattr(module, "ENOUGH_PER_MULTIPROCESSOR", 0)
    monkeypatch.setattr(module, "PART_BYTES", 0)
    whole = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.2, kind)
    assert torch.equal(together, whole)


def test_half_precision(poisoned):
    check(Pages(MIXED, 6, 2, 64, torch.float16, device=DEVICE), 0.125)


@pytest.mark.parametrize("block_size", [1, 8, 48])
def test_any_block_size(poisoned, block_size):
    pages = Pages([(1, 50), (40, 70)], 4, 2, 32, torch.float32, block_size, DEVICE)
    check(pages, 0.125)


@pytest.mark.parametrize(
    "lengths", [[(1, 700)], [(1, 128), (1, 129), (2, 31)], [(100, 150)], [(20, 20)] * 3], ids=str
)
def test_uniform_and_long(poisoned, lengths):
    check(Pages(lengths, 4, 2, 64, torch.float32, device=DEVICE), 0.125)


def test_large_scores_do_not_overflow(poisoned):
    pages = Pages([(20, 100), (1, 150)], 4, 2, 64, torch.float32, device=DEVICE)
    check(pages, 30.0, 2e-3)  # the order of fp32 sums differs, times the scale


def test_a_query_that_sees_nothing_gets_zeros(poisoned):
    pages = Pages([(1, 40), (1, 1)], 4, 2, 64, torch.float32, device=DEVICE)
    pages.batch.context_lens[1] = 0
    ours = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 1.0)
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    assert ours.isfinite().all()


def test_an_empty_batch():
    pages = Pages([(0, 5)], 4, 2, 64, torch.float32, device=DEVICE)
    ours = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 1.0)
    assert ours.shape == (0, 4, 64)


def one_by_one(pages: Pages) -> list[torch.Tensor]:
    """The same sequences, each in a call of its own."""
    starts, lengths = pages.batch.query_starts.tolist(), pages.batch.context_lens.tolist()
    results = []
    for b, context in enumerate(lengths):
        count = starts[b + 1] - starts[b]
        alone = AttentionBatch(
            torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
            pages.batch.context_lens[b : b + 1],
            pages.batch.block_tables[b : b + 1],
            count,
            context,
        )
        query = pages.query[starts[b] : starts[b + 1]]
        results.append(triton_paged_attention(query, pages.kv_cache, alone, 0.2, pages.kind))
    return results


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    pages = Pages(MIXED, 6, 2, 64, torch.float32, device=DEVICE)
    together = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.2)
    assert torch.equal(together, torch.cat(one_by_one(pages)))


def test_the_invariant_one_gives_a_query_the_same_bits_however_its_prompt_is_cut(poisoned):
    pages = Pages([(150, 150)], 6, 2, 64, torch.float32, device=DEVICE)
    whole = triton_invariant_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.2)
    torch.testing.assert_close(whole.float(), pages.expected(0.2), rtol=1e-5, atol=1e-5)
    for cuts in ([0, 1, 2, 50, 51, 150], [0, 140, 145, 149, 150]):
        pieces = []
        for first, stop in zip(cuts, cuts[1:], strict=False):
            piece = AttentionBatch(
                torch.tensor([0, stop - first], dtype=torch.int32, device=DEVICE),
                torch.tensor([stop], dtype=torch.int32, device=DEVICE),
                pages.batch.block_tables,
                stop - first,
                stop,
            )
            query = pages.query[first:stop]
            pieces.append(triton_invariant_paged_attention(query, pages.kv_cache, piece, 0.2))
        # The interpreter's products round by where a row stands in its tile; a GPU's do not.
        tolerance = 0 if DEVICE == "cuda" else 1e-5
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=tolerance)


GRAINS = {  # multiprocessor's fill, bytes of parts
    "tiles": (20, 1 << 25),
    "chunks": (4, 1 << 25),
    "splits": (0.5, 1 << 25),
    "whole contexts": (0, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_who_adds_the_parts_changes_no_bit(poisoned, monkeypatch, dtype):
    """And whether there is enough to do depends on the batch and on the GPU."""
    lengths = [(1, 700), (2, 2), (1, 256), (0, 0), (1, 1100), (2, 65), (1, 450)]
    pages = Pages(lengths, 3, 1, 64, dtype, device=DEVICE)
    results = []
    for fill, part_bytes in GRAINS.values():
        monkeypatch.setattr(module, "ENOUGH_PER_MULTIPROCESSOR", fill)
        monkeypatch.setattr(module, "PART_BYTES", part_bytes)
        check(pages, 0.125)
        results.append(triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.125))
    for grain, result in zip(GRAINS, results, strict=True):
        assert torch.equal(result, results[0]), grain


def at_bounds(pages: Pages, num_sequences: int, num_tokens: int, longest: int) -> AttentionBatch:
    """The batch as a CUDA graph has it: padded with sequences without queries, lengths unknown."""
    batch = pages.batch
    starts = torch.full((num_sequences + 1,), int(batch.query_starts[-1]))
    starts[: len(batch.query_starts)] = batch.query_starts
    lengths = torch.zeros(num_sequences)
    lengths[: len(batch.context_lens)] = batch.context_lens
    tables = torch.full((num_sequences, 8192), 2**30)
    tables[: len(batch.block_tables), : batch.block_tables.shape[1]] = batch.block_tables
    return AttentionBatch(
        *(t.int().to(DEVICE) for t in (starts, lengths, tables)), longest, 131_072
    )


@pytest.mark.parametrize(
    ("lengths", "num_sequences", "num_tokens", "longest"),
    [
        ([(1, 40), (1, 300), (1, 1)], 24, 24, 1),
        ([], 2, 2, 1),
        (MIXED, 150, 128, 128),
        ([(1, 70)], 64, 128, 128),
        ([(100, 150)], 64, 128, 128),
        ([(40, 40)] * 3, 3, 120, 120),
    ],
    ids=["decodes", "none", "mixed", "one decode", "one chunk", "full"],
)
def test_bounds_above_the_batch(poisoned, lengths, num_sequences, num_tokens, longest):
    pages = Pages(lengths or [(0, 1)], 6, 2, 64, torch.float32, device=DEVICE)
    batch = at_bounds(pages, num_sequences, num_tokens, longest)
    count = len(pages.query)
    query = torch.full((num_tokens, 6, 64), float("nan"), device=DEVICE)
    query[:count] = pages.query
    ours = triton_paged_attention(query, pages.kv_cache, batch, 0.125)
    torch.testing.assert_close(ours[:count], pages.expected(0.125), rtol=1e-5, atol=1e-5)
    assert not ours[count:].any(), "tokens of no sequence get zeros"
    within = triton_paged_attention(pages.query, pages.kv_cache, pages.batch, 0.125)
    assert torch.equal(ours[:count], within)


def test_more_items_than_programs_and_more_sequences_than_are_counted_at_once(poisoned):
    lengths = [(i % 4, 1 + 13 * i % 90) for i in range(150)]
    lengths = [(count, max(count, context)) for count, context in lengths]
    pages = Pages(lengths, 2, 1, 16, torch.float32, device=DEVICE)
    check(pages, 0.25)


def test_it_refuses_what_it_would_misread():
    pages = Pages([(2, 20)], 4, 2, 64, torch.float32, device=DEVICE)
    query, cache, batch = pages.query, pages.kv_cache, pages.batch
    with pytest.raises(ValueError, match="multiple of Hkv"):
        triton_paged_attention(query[:, :3], cache, batch, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        triton_paged_attention(query.half(), cache, batch, 1.0)
    with pytest.raises(ValueError, match="dense heads"):
        triton_paged_attention(query[:, :, ::2], cache[..., :32].contiguous(), batch, 1.0)


@OF_ALL_KINDS
def test_hopper_says_that_it_has_plain_attention_only(kind):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, **kind.sizes()}
    choice = PAGED_ATTENTION.select(Case("cuda", torch.bfloat16, sizes))
    assert "not hopper: made for causal attention to all tokens before" in str(choice)


def test_cases_left_to_the_reference_say_why():
    wide = PAGED_ATTENTION.select(Case("cuda", torch.bfloat16, {"head_dim": 512}))
    assert wide.name == "reference"
    assert "head sizes up to 256, not 512" in str(wide)
    on_cpu = PAGED_ATTENTION.select(Case("cpu", torch.float16, {"head_dim": 64}))
    assert "made for cuda, not cpu" in str(on_cpu)
