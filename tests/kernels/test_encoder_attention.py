"""Attention within segments: the reference against a mask, and Triton's against the reference.

Triton runs in its interpreter, or on the GPU if there is one. The interpreter cannot multiply bf16
matrices; `tests/gpu/test_cuda_encoders.py` does.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from octavo.kernels import ENCODER_ATTENTION, Case, Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
# Nobody, one token, tiles that end where segments do, and those that do not.
LENGTHS = [0, 1, 64, 17, 32, 0, 33, 150, 128, 5]


class Step:
    """Heads as one product makes them, and between the segments' rows some that are NaN."""

    def __init__(self, lengths, num_heads, dim, dtype=torch.float32, *, key_lengths=None):
        self.queries = Segments.of(lengths, DEVICE)
        own = key_lengths is None
        self.keys = self.queries if own else Segments.of(key_lengths, DEVICE)
        num_tokens, num_keys = sum(lengths), sum(lengths if own else key_lengths)
        shape = (num_tokens + 3, 3, num_heads, dim)  # three rows of nobody
        heads = torch.randn(shape).to(DEVICE, dtype)
        heads[num_tokens:] = float("nan")
        self.query, self.key, self.value = (part[:num_tokens] for part in heads.unbind(1))
        if not own:
            both = torch.randn(num_keys + 3, 2, num_heads, dim).to(DEVICE, dtype)
            both[num_keys:] = float("nan")
            self.key, self.value = (part[:num_keys] for part in both.unbind(1))

    def run(self, attend, scale: float = 0.3) -> Tensor:
        return attend(self.query, self.key, self.value, self.queries, self.keys, scale)

    def masked(self, scale: float = 0.3) -> Tensor:
        """By the formula, over all keys at once, in fp64."""
        query, key, value = (rows.double() for rows in (self.query, self.key, self.value))
        scores = torch.einsum("thd,shd->hts", query, key) * scale
        mine, theirs = (_owners(s, len(r)) for s, r in ((self.queries, query), (self.keys, key)))
        scores.masked_fill_(mine[:, None] != theirs[None, :], float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), value)


def _owners(segments: Segments, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=segments.starts.device)
    return torch.searchsorted(segments.starts[1:].long(), rows, right=True)


def test_segments_know_their_bounds():
    segments = Segments.of([3, 0, 5], "cpu")
    assert segments.starts.tolist() == [0, 3, 3, 8]
    assert segments.starts.dtype == torch.int32
    assert segments.max_len == 5
    assert Segments.of([], "cpu").max_len == 0


def test_the_reference_is_attention_that_other_segments_are_masked_from():
    step = Step(LENGTHS, 3, 24)
    torch.testing.assert_close(
        step.run(ENCODER_ATTENTION.reference).double(), step.masked(), rtol=1e-5, atol=1e-5
    )
    crossing = Step([4, 1, 7], 2, 16, key_lengths=[30, 2, 9])
    torch.testing.assert_close(
        crossing.run(ENCODER_ATTENTION.reference).double(),
        crossing.masked(),
        rtol=1e-5,
        atol=1e-5,
    )


class TestTriton:
    @pytest.fixture
    def attend(self, poisoned):
        pytest.importorskip("triton")
        from octavo.kernels.triton_encoder_attention import triton_encoder_attention

        return triton_encoder_attention

    @staticmethod
    def check(step: Step, attend, scale: float = 0.3) -> None:
        made = step.run(attend, scale)
        assert made.is_contiguous()
        tolerance = TOLERANCE[made.dtype]
        torch.testing.assert_close(
            made.double(), step.masked(scale), rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize(
        ("num_heads", "dim"), [(3, 8), (2, 64), (1, 72), (2, 80), (1, 88), (1, 96), (1, 128)]
    )
    def test_heads_of_any_size(self, attend, num_heads, dim):
        self.check(Step(LENGTHS, num_heads, dim), attend)

    def test_the_largest_heads(self, attend):
        self.check(Step([20, 3], 1, 256), attend, 0.0625)

    @pytest.mark.parametrize("dim", [64, 80])
    def test_half_precision(self, attend, dim):
        self.check(Step([16, 64, 130, 1], 2, dim, torch.float16), attend, dim**-0.5)

    def test_windows_of_one_size_have_no_partial_tiles(self, attend):
        self.check(Step([64] * 5, 2, 40), attend)
        self.check(Step([4] * 30 + [2] * 7, 2, 40), attend)

    def test_queries_that_read_other_rows(self, attend):
        self.check(Step([6, 6, 6], 2, 48, key_lengths=[50, 50, 50]), attend)
        self.check(Step([4, 40, 7], 2, 16, key_lengths=[130, 2, 9]), attend)

    @pytest.mark.parametrize("seed", range(12))
    def test_random_steps(self, attend, seed):
        draw = random.Random(seed)
        lengths = [draw.choice([0, 1, draw.randrange(200)]) for _ in range(draw.randrange(1, 6))]
        crosses = draw.random() < 0.4
        others = [draw.randrange(1, 150) for _ in lengths] if crosses else None
        torch.manual_seed(seed)
        heads, dim = draw.randrange(1, 4), draw.randrange(1, 100)
        self.check(Step(lengths, heads, dim, key_lengths=others), attend)

    def test_large_scores_do_not_overflow(self, attend):
        step = Step([70, 3], 2, 64)
        made = step.run(attend, 30.0)
        # The order of fp32 sums differs, times the scale.
        torch.testing.assert_close(made.double(), step.masked(30.0), rtol=2e-3, atol=2e-3)

    def test_a_segment_has_the_same_bits_alone_and_among_others(self, attend):
        step = Step([40, 7, 64, 33], 2, 72)
        made, first = step.run(attend), 0
        for length in (40, 7, 64, 33):
            rows = slice(first, first + length)
            alone = Segments.of([length], DEVICE)
            parts = (part[rows] for part in (step.query, step.key, step.value))
            one = attend(*parts, alone, alone, 0.3)
            assert torch.equal(one, made[rows])
            first += length

    def test_nothing(self, attend):
        assert Step([], 2, 16).run(attend).shape == (0, 2, 16)
        assert Step([0, 0], 2, 16).run(attend).shape == (0, 2, 16)

    def test_it_refuses_what_it_would_misread(self, attend):
        step = Step([5, 3], 2, 16)
        with pytest.raises(ValueError, match="as many segments"):
            attend(step.query, step.key, step.value, step.queries, Segments.of([8], DEVICE), 1.0)
        with pytest.raises(ValueError, match="one dtype"):
            attend(step.query, step.key.half(), step.value, step.queries, step.keys, 1.0)
        with pytest.raises(ValueError, match=r"key and value \[S, H, D\]"):
            attend(step.query, step.key, step.value[:, :1], step.queries, step.keys, 1.0)
        with pytest.raises(ValueError, match="dense heads"):
            sparse = torch.randn(8, 2, 32, device=DEVICE)[..., ::2]
            attend(step.query, sparse, step.value, step.queries, step.keys, 1.0)


def test_heads_that_are_too_large_get_the_reference_and_are_told_why():
    choice = ENCODER_ATTENTION.select(Case("cuda", torch.bfloat16, {"head_dim": 320}))
    assert choice.name == "reference"
    assert "up to 256, not 320" in str(choice)
