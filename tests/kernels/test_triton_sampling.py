"""Triton's sampling against the documented steps: in its interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo.kernels import triton_sample_tokens as module
from octavo.kernels.sample_tokens import SAMPLE_TOKENS, DrawOptions
from octavo.kernels.triton_sample_tokens import triton_sample_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INFINITY = float("inf")
# The interpreter's numpy warns of infinities that are meant, such as the logarithm of a min-p of 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """So that small vocabularies have several."""
    monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(module, "SEARCHED_AT_ONCE", 512)


def options(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> DrawOptions:
    """Columns from one value for all rows, or from one for each."""

    def column(value, dtype: torch.dtype) -> Tensor:
        return (torch.zeros(rows) + torch.as_tensor(value)).to(DEVICE, dtype)

    return DrawOptions(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seeds=torch.randint(-(2**62), 2**62, (rows,)).to(DEVICE),
        positions=torch.randint(0, 2**40, (rows,)).to(DEVICE),
        truncates=(top_k, top_p, min_p) != (0, 1.0, 0.0),
    )


def normal(*shape: int) -> Tensor:
    return (3 * torch.randn(*shape)).to(DEVICE)


def check(logits: Tensor, wanted: DrawOptions) -> None:
    """The same tokens as the reference, which sums in another order: one in 10^5 might differ."""
    ours, ours_finite = triton_sample_tokens(logits, wanted)
    expected, finite = SAMPLE_TOKENS.reference(logits.double(), wanted)
    assert torch.equal(ours_finite, finite)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("vocabulary", [1, 2, 100, 256, 1000])
def test_plain_draws(vocabulary):
    check(normal(6, vocabulary), options(6, temperature=0.8))


@pytest.mark.parametrize(
    "truncation",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 9999},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_truncated_draws(truncation):
    check(normal(3, 700), options(3, temperature=0.9, **truncation))


def test_rows_with_options_of_their_own():
    wanted = options(
        5,
        temperature=[0.0, 1.0, 0.5, 2.0, 1.0],
        top_k=[3, 0, 7, 0, 20],
        top_p=[0.5, 1.0, 1.0, 0.7, 0.9],
        min_p=[0.0, 0.0, 0.3, 0.0, 0.0],
    )
    check(normal(5, 600), wanted)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}], ids=str)
def test_half_precision_logits_draw_as_the_same_numbers_in_fp32(half, truncation):
    """Rounded logits tie often, at the edges too. Rows are strided, as a padded head's are."""
    logits = normal(6, 1000).to(half)[:, :700]
    wanted = options(6, temperature=[0.0, 1.0, 0.7, 1.3, 0.0, 2.0], **truncation)
    logits[4, [650, 13, 300]] = 30.0
    ours, finite = triton_sample_tokens(logits, wanted)
    assert finite.all() and ours[4] == 13
    assert torch.equal(ours, triton_sample_tokens(logits.float(), wanted)[0])
    assert torch.equal(ours, SAMPLE_TOKENS.reference(logits, wanted)[0])


def test_ties_at_the_edge_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(60, 5).contiguous().to(DEVICE)
    ours, _ = triton_sample_tokens(logits, options(60, top_k=2))
    assert set(ours.tolist()) == {0, 1, 2, 3}
    check(logits, options(60, top_k=2))


def test_banned_tokens_are_not_drawn():
    logits = normal(3, 300)
    logits[:, 17:] = -INFINITY
    logits[0, :16] = -INFINITY
    for wanted in (options(3), options(3, top_k=30), options(3, top_p=0.99)):
        ours, finite = triton_sample_tokens(logits, wanted)
        assert finite.all()
        assert int(ours.max()) < 17
        assert ours[0] == 16


def test_greedy_takes_the_first_of_the_likeliest():
    logits = normal(3, 900)
    logits[1, [850, 410, 420]] = 50.0
    ours, _ = triton_sample_tokens(logits, options(3, temperature=0.0))
    assert ours.tolist() == [int(logits[0].argmax()), 410, int(logits[2].argmax())]


def test_rows_that_are_not_finite_are_told_apart():
    logits = normal(5, 500)
    logits[0, 499] = float("nan")
    logits[1, 3] = INFINITY
    logits[2] = -INFINITY
    logits[3, :400] = -INFINITY
    for wanted in (options(5), options(5, temperature=0.0), options(5, top_p=0.9, top_k=5)):
        ours, finite = triton_sample_tokens(logits, wanted)
        assert finite.tolist() == [False, False, False, True, True]
        assert ((ours >= 0) & (ours < 500)).all()


def test_a_row_draws_the_same_in_any_batch_and_with_strided_rows():
    logits, wanted = normal(3, 700), options(3, top_p=0.9)
    together, _ = triton_sample_tokens(logits, wanted)
    wide = torch.full((3, 900), float("nan"), device=DEVICE)
    wide[:, 100:800] = logits
    assert torch.equal(triton_sample_tokens(wide[:, 100:800], wanted)[0], together)
    for i in range(3):
        columns = {
            name: getattr(wanted, name)[i : i + 1]
            for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        }
        alone, _ = triton_sample_tokens(logits[i : i + 1], DrawOptions(**columns, truncates=True))
        assert alone[0] == together[i]


def test_it_refuses_what_it_would_misread():
    with pytest.raises(ValueError, match="dense rows"):
        triton_sample_tokens(normal(4, 6).t(), options(6))
    wrong = {name: getattr(options(2), name) for name in DrawOptions.__slots__}
    with pytest.raises(ValueError, match="int64"):
        DrawOptions(**wrong | {"seeds": wrong["seeds"].int()})
