"""Every compiled op: a row has the same bits whatever is beside it, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from octavo.kernels import (
    KV_WRITE,
    LINEAR,
    PAGED_ATTENTION,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SILU_MUL,
    AttentionBatch,
    Case,
)

TOTAL_ROWS = 200
PARTS = [
    (0, 1),
    (3, 2),
    (7, 5),
    (10, 6),
    (20, 7),
    (31, 16),
    (40, 17),
    (60, 100),
    (0, 129),
    (1, 199),
]


def chosen(op, dtype, **sizes):
    choice = op.select(Case("cpu", dtype, sizes))
    assert choice.name == "native"
    return choice.function


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_rows(function, *tensors: Tensor) -> None:
    """function(*rows of tensors) gives each row what it gives it among all rows."""
    together = function(*tensors)
    for first, count in PARTS:
        part = function(*(tensor[first : first + count].clone() for tensor in tensors))
        assert torch.equal(part, together[first : first + count]), f"{count} rows"
    for count in (1, 3):
        with threads(count):
            assert torch.equal(function(*tensors), together), f"{count} threads"


# 4100 exceeds the depth of one block, 1000 outputs the panels of one tile
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (70, 77), (1000, 576), (40, 4100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(isa, dtype, outputs, width, with_bias):
    linear = chosen(LINEAR, dtype)
    prepared = linear.prepare(torch.randn(outputs, width, dtype=dtype))
    bias = torch.randn(outputs, dtype=dtype) if with_bias else None
    x = torch.randn(TOTAL_ROWS, width, dtype=dtype)
    check_rows(lambda x: linear.apply(x, prepared, bias), x)


@pytest.mark.parametrize("width", [16, 100, 576])
def test_rms_norm(isa, dtype, width):
    norm, weight = chosen(RMS_NORM, dtype), torch.randn(width, dtype=dtype)
    x, residual = torch.randn(2, TOTAL_ROWS, width, dtype=dtype)
    check_rows(lambda x: norm(x, weight, 1e-5)[0], x)
    # the residual is written over
    check_rows(lambda x, r: torch.cat(norm(x, weight, 1e-5, r.clone()), dim=1), x, residual)


@pytest.mark.parametrize("width", [16, 100, 1536])
def test_silu_mul(isa, dtype, width):
    check_rows(chosen(SILU_MUL, dtype), 3 * torch.randn(TOTAL_ROWS, 2 * width, dtype=dtype))


@pytest.mark.parametrize("dim", [64, 80])
def test_rotary_kv_write(isa, dtype, dim):
    op = chosen(ROTARY_KV_WRITE, dtype)
    cos_sin = torch.randn(1000, dim)

    def run(qkv: Tensor, positions: Tensor) -> Tensor:
        tokens = positions.shape[0]
        query, key, value = qkv.clone().view(tokens, 12, dim).split((6, 3, 3), 1)
        cache = torch.zeros(2, -(-tokens // 16), 3, 16, dim, dtype=dtype)
        op(query, key, value, positions, cos_sin, cache, torch.arange(tokens))
        written = cache.permute(1, 3, 0, 2, 4).flatten(0, 1)[:tokens].flatten(1)
        return torch.cat((query.flatten(1), written), dim=1)

    qkv = torch.randn(TOTAL_ROWS, 12 * dim, dtype=dtype)
    check_rows(run, qkv, torch.randint(0, 1000, (TOTAL_ROWS,)))


class Sequences:
    """Sequences of some lengths: queries of every token, and all keys and values in one cache."""

    HEADS, KV_HEADS, DIM = 9, 3, 64

    def __init__(self, lengths: list[int], dtype: torch.dtype):
        self.attention = chosen(PAGED_ATTENTION, dtype, head_dim=self.DIM, block_size=16)
        blocks = [-(-length // 16) for length in lengths]
        order = torch.randperm(sum(blocks)).int()
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for b, part in enumerate(order.split(blocks)):
            self.tables[b, : len(part)] = part
        self.queries = [torch.randn(n, self.HEADS, self.DIM, dtype=dtype) for n in lengths]
        shape = (2, sum(blocks), self.KV_HEADS, 16, self.DIM)
        self.cache = torch.randn(shape, dtype=dtype)

    def attend(self, *steps: tuple[int, int, int]) -> list[Tensor]:
        """One call; each step is (sequence, first query, number of queries)."""
        which = [b for b, _, _ in steps]
        counts = [count for _, _, count in steps]
        contexts = [first + count for _, first, count in steps]
        batch = AttentionBatch(
            torch.tensor([0, *counts]).cumsum(0).int(),
            torch.tensor(contexts).int(),
            self.tables[which].contiguous(),
            max(counts),
            max(contexts),
        )
        query = torch.cat([self.queries[b][first : first + count] for b, first, count in steps])
        return list(self.attention(query, self.cache, batch, 0.125).split(counts))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_attention_beside_other_sequences_and_on_other_threads(isa, dtype, count):
    sequences = Sequences([1, 40, 128, 129, 300, 1037, 600, 2, 16, 500], dtype)
    firsts = [max(0, len(q) - 1 - 37 * (b % 3)) for b, q in enumerate(sequences.queries)]
    steps = [(b, first, len(sequences.queries[b]) - first) for b, first in enumerate(firsts)]
    with threads(count):
        together = sequences.attend(*steps)
        pairs = [sequences.attend(*steps[i : i + 2]) for i in range(0, len(steps), 2)]
    alone = [sequences.attend(step)[0] for step in steps]
    for b, expected in enumerate(alone):
        assert torch.equal(together[b], expected), f"sequence {b} among all"
        assert torch.equal(pairs[b // 2][b % 2], expected), f"sequence {b} of two"


@pytest.mark.parametrize("cut", [1, 7, 16, 100, 128, 256])
def test_attention_does_not_depend_on_how_a_prompt_was_cut(isa, dtype, cut):
    sequences = Sequences([333], dtype)
    (whole,) = sequences.attend((0, 0, 333))
    for first in range(0, 333, cut):
        count = min(cut, 333 - first)
        (part,) = sequences.attend((0, first, count))
        assert torch.equal(part, whole[first : first + count]), f"queries from {first}"


def test_kv_write_copies_bits(isa, dtype):
    key, value = torch.randn(2, 20, 3, 64, dtype=dtype)
    cache = torch.zeros(2, 2, 3, 16, 64, dtype=dtype)
    chosen(KV_WRITE, dtype)(key, value, cache, torch.arange(20))
    rows = cache.transpose(2, 3).reshape(2, 32, 3, 64)[:, :20]
    assert torch.equal(rows, torch.stack((key, value)))
