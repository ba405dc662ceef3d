"""Attention over latents: the reference against plain attention, and Triton's against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import LATENT_ATTENTION, LATENT_KV_WRITE, PAGED_ATTENTION, AttentionBatch, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16
# (tokens of this step, all tokens) of each sequence: a decode, prompts, a chunk, nobody, two pages
LENGTHS = [(1, 37), (5, 5), (3, 20), (0, 9), (17, 33), (1, 1)]


class Step:
    """Queries, and a cache whose other blocks are full of NaN."""

    def __init__(self, num_heads: int, rank: int, turned: int, dtype: torch.dtype):
        width, self.rank = rank + turned, rank
        starts = torch.tensor([0, *(n for n, _ in LENGTHS)]).cumsum(0).int()
        pages = [-(-length // BLOCK_SIZE) for _, length in LENGTHS]
        tables = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
        free = torch.randperm(sum(pages) + 3).int()
        cache = torch.full((1, len(free), 1, BLOCK_SIZE, width), float("nan"))
        for b, count in enumerate(pages):
            mine, free = free[:count], free[count:]
            tables[b, :count] = mine
            rows = torch.randn(LENGTHS[b][1], width)
            for position, row in enumerate(rows):
                cache[0, mine[position // BLOCK_SIZE], 0, position % BLOCK_SIZE] = row
        self.cache = cache.to(DEVICE, dtype)
        self.query = torch.randn(int(starts[-1]), num_heads, width).to(DEVICE, dtype)
        lengths = torch.tensor([length for _, length in LENGTHS], dtype=torch.int32)
        self.batch = AttentionBatch(
            starts.to(DEVICE),
            lengths.to(DEVICE),
            tables.to(DEVICE),
            max(n for n, _ in LENGTHS),
            int(lengths.max()),
        )

    def run(self, attend) -> Tensor:
        return attend(self.query, self.cache, self.batch, self.query.shape[2] ** -0.5, self.rank)


def test_it_is_attention_whose_values_are_the_first_numbers_of_its_keys():
    step = Step(num_heads=6, rank=40, turned=16, dtype=torch.float32)
    both = step.cache.expand(2, -1, -1, -1, -1)
    scale = step.query.shape[2] ** -0.5
    expected = PAGED_ATTENTION.reference(step.query, both, step.batch, scale)[..., :40]
    torch.testing.assert_close(step.run(LATENT_ATTENTION.reference), expected)


def test_the_write_rotates_and_touches_its_slots_only():
    from octavo.kernels.rotary_kv_write import reference_rotary

    query, latent, key = torch.randn(5, 3, 8), torch.randn(5, 20), torch.randn(5, 8)
    positions, slots = torch.tensor([3, 0, 9, 4, 4]), torch.tensor([40, 3, 17, 16, 0])
    angles = torch.randn(10, 8)
    turned_query, turned_key = query.clone(), key.clone()[:, None]
    for heads in (turned_query, turned_key):
        reference_rotary(heads, positions, angles)
    cache = torch.full((1, 3, 1, 16, 28), float("nan"))
    LATENT_KV_WRITE.reference(query, latent, key, positions, angles, cache, slots)
    assert torch.equal(query, turned_query)
    rows = cache.view(-1, 28)
    assert torch.equal(rows[slots], torch.cat((latent, turned_key[:, 0]), 1))
    assert rows.isnan().any(1).sum() == len(rows) - 5


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("num_heads", "rank", "turned"), [(16, 64, 16), (5, 40, 8), (33, 24, 18)])
def test_triton(poisoned, half, num_heads, rank, turned):
    pytest.importorskip("triton")
    from octavo.kernels.triton_latent_attention import triton_latent_attention

    # Triton's interpreter cannot multiply matrices of bf16.
    dtype = torch.float32 if not half else torch.bfloat16 if DEVICE == "cuda" else torch.float16
    step = Step(num_heads, rank, turned, dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    expected = step.run(LATENT_ATTENTION.reference)
    made = step.run(triton_latent_attention)
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)


def test_triton_refuses_what_it_would_misread():
    pytest.importorskip("triton")
    from octavo.kernels.triton_latent_attention import triton_latent_attention

    step = Step(num_heads=2, rank=8, turned=4, dtype=torch.float32)
    step.cache = step.cache.expand(2, -1, -1, -1, -1)
    with pytest.raises(ValueError, match="latent_attention"):
        step.run(triton_latent_attention)
    wide = LATENT_ATTENTION.select(Case("cuda", torch.bfloat16, {"kv_lora_rank": 1024}))
    assert wide.name == "reference" and "at most 512" in str(wide)
