"""Triton's matrix products on a GPU, at the shapes of real models: against products in fp32.

`tests/kernels/test_triton_linear.py` has the cases that the interpreter can also run.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import LINEAR, Case

compile_ahead = pytest.importorskip("octavo.kernels.triton_launch").compile_ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

# Of ‖ours - reference‖ / ‖reference‖; a bf16 result is itself rounded to 2e-3 of its size.
ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
LLAMA_8B = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)]
QWEN3_600M = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151_936, 1024)]
SHAPES = [*LLAMA_8B, *QWEN3_600M]
ODD_SHAPES = [(100, 576), (4097, 4095), (1, 30_000), (640, 200)]
ROWS = [1, 2, 3, 7, 16, 17, 64, 100, 128, 255, 257]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The kernels of most tests, compiled side by side: one after the other they take minutes."""
    with compile_ahead(os.cpu_count() or 1):
        for outputs, depth in (*SHAPES, *ODD_SHAPES):
            odd = (outputs, depth) in ODD_SHAPES
            dtype = torch.float16 if odd else torch.bfloat16
            weight = torch.zeros(outputs, depth, device="cuda", dtype=dtype)
            bias = weight[:, 0].contiguous() if odd else None
            for sizes in ({}, {"batch_invariant": 1}):
                linear = chosen(dtype, **sizes)
                prepared = linear.prepare(weight)
                for rows in (*ROWS, 4000):
                    linear.apply(weight.new_zeros(rows, depth), prepared, bias)


@pytest.fixture(autouse=True)
def _poisoned():
    """New memory holds NaN, so that an output left unwritten shows."""
    torch.manual_seed(0)
    random.seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def chosen(dtype: torch.dtype = torch.bfloat16, **sizes: int):
    choice = LINEAR.select(Case("cuda", dtype, sizes))
    assert choice.name == ("triton-invariant" if sizes else "triton"), str(choice)
    return choice.function


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def close(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    assert ours.isfinite().all()
    bias = None if bias is None else bias.float()
    expected = functional.linear(x.float(), weight.float(), bias)
    error = (ours.float() - expected).norm() / expected.norm()
    assert error < ERROR[ours.dtype], f"relative error {error:.2e} for {tuple(x.shape)}"


@pytest.mark.parametrize("sizes", [{}, {"batch_invariant": 1}], ids=["fastest", "invariant"])
@pytest.mark.parametrize(("outputs", "depth"), [*SHAPES, *ODD_SHAPES])
def test_every_shape_and_number_of_rows(outputs, depth, sizes):
    odd = (outputs, depth) in ODD_SHAPES
    dtype = torch.float16 if odd else torch.bfloat16
    linear = chosen(dtype, **sizes)
    weight = normal(outputs, depth, dtype=dtype)
    bias = normal(outputs, dtype=dtype) if odd else None
    prepared = linear.prepare(weight)
    wide = torch.full((257, depth + 64), float("nan"), device="cuda", dtype=dtype)
    wide[:, 32:-32] = normal(257, depth, dtype=dtype)
    for rows in ROWS:
        x = wide[:rows, 32:-32] if rows % 2 else wide[:rows, 32:-32].contiguous()
        close(linear.apply(x, prepared, bias), x, weight, bias)
    assert not prepared.arrivals.any()


@pytest.mark.parametrize("sizes", [{}, {"batch_invariant": 1}], ids=["fastest", "invariant"])
def test_a_long_prefill(sizes):
    linear, weight, x = chosen(**sizes), normal(1024, 2048), normal(20_000, 2048)
    close(linear.apply(x, linear.prepare(weight), None), x, weight)


@pytest.mark.parametrize(("outputs", "depth"), [*LLAMA_8B, *QWEN3_600M[:4], (640, 200)])
def test_invariant_rows_have_the_same_bits_alone_and_in_a_batch(outputs, depth):
    linear = chosen(batch_invariant=1)
    x, weight = normal(4000, depth), normal(outputs, depth)
    prepared = linear.prepare(weight)
    whole = linear.apply(x, prepared, None)
    for rows in (*ROWS, 300, 1000, 3999):
        for first in (0, random.randint(0, 4000 - rows)):
            part = slice(first, first + rows)
            assert torch.equal(linear.apply(x[part], prepared, None), whole[part]), rows


@pytest.mark.parametrize("sizes", [{}, {"batch_invariant": 1}], ids=["fastest", "invariant"])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_a_chain_in_a_graph_sees_new_inputs_at_each_replay(rows, sizes):
    """Each product waits for the one before it, though it is launched before that one ends."""
    linear, width = chosen(**sizes), 1024
    weights = [normal(width, width) / width**0.5 for _ in range(12)]
    prepared = [linear.prepare(weight) for weight in weights]
    x = normal(rows, width)

    def chain() -> Tensor:
        y = x
        for each in prepared:
            y = linear.apply(y, each, None)
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(3):
        x.copy_(normal(rows, width))
        out.fill_(float("nan"))
        graph.replay()
        expected = x
        for weight in weights:
            expected = functional.linear(expected.float(), weight.float()).to(x.dtype)
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        assert error < 5 * ERROR[x.dtype]  # roundings of twelve results
        assert torch.equal(chain(), out)  # and the same bits at each run


@pytest.mark.parametrize("rows", [1, 4, 16, 128])
def test_candidates_of_the_tuner_are_right(rows):
    from octavo.bench.tune_kernels import candidates, prepare_for_any, try_launch

    shape, depth = (1000, 2048), 2048
    weight, x = prepare_for_any(normal(*shape)), normal(rows, depth)
    some = candidates(shape, rows)
    for blocks in random.sample(some, min(6, len(some))):  # each is a second of compiling
        ours = try_launch(x, weight, blocks)
        if ours is not None:
            close(ours, x, weight.plain)
    assert not weight.arrivals.any()
