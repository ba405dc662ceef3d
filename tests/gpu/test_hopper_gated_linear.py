"""The gated product on Hopper against products in fp32, on odd sizes and in the layer that runs it.

`tests/kernels/test_hopper_gated_linear.py` compiles it where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from octavo.kernels import GATED_LINEAR, SILU_MUL, Case
from octavo.kernels.gated_linear import is_worth_one_kernel
from octavo.kernels.triton_support import needs_hopper

CASE = Case("cuda", torch.bfloat16, {"size": 1024, "in_features": 512})
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(needs_hopper(CASE) is not None, reason=str(needs_hopper(CASE))),
]

# Of ‖ours - reference‖ / ‖reference‖; a bf16 result is itself rounded to 2e-3 of its size.
ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
NAN = float("nan")


def refuse(*_):
    raise AssertionError("these rows are made by one kernel")


@pytest.mark.parametrize(
    ("rows", "depth", "outputs"),
    [
        (8192, 4096, 14_336),
        (1025, 4096, 14_336),
        (4097, 1024, 3072),
        (1366, 1024, 3072),
        (1500, 576, 4104),  # neither 128 rows nor outputs, nor whole steps of 64 inputs
        (33_000, 8, 136),
        (2049, 200, 2056),
    ],
)
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
def test_it_is_the_product_and_its_activation(rows, depth, outputs, dtype):
    torch.manual_seed(0)
    assert is_worth_one_kernel(rows, outputs)
    sizes = {"size": outputs, "in_features": depth, "bias": 0}
    choice = GATED_LINEAR.select(Case("cuda", dtype, sizes))
    assert choice.name == "hopper", str(choice)
    wide = torch.full((rows + 130, depth + 8), NAN, device="cuda", dtype=dtype)
    wide[:rows, :depth] = torch.randn(rows, depth, device="cuda")
    x = wide[:rows, :depth]  # rows are strided, and what is beyond them is no number
    weight = (torch.randn(2 * outputs, depth, device="cuda") / depth**0.5).to(dtype)
    product = functional.linear(x.float(), weight.float())
    expected = functional.silu(product[:, :outputs]) * product[:, outputs:]
    del product
    results = []
    for _ in range(2):
        poison = torch.full((rows, outputs), NAN, device="cuda", dtype=dtype)
        del poison  # the result's memory, most likely
        results.append(choice.function(x, weight, refuse, refuse))
    assert results[0].isfinite().all() and torch.equal(*results)
    error = (results[0].float() - expected).norm() / expected.norm()
    assert error < ERROR[dtype], f"relative error {error:.2e}"


def test_few_rows_and_weights_in_other_formats_are_made_by_two_kernels():
    kernel = GATED_LINEAR.select(CASE).function
    weight = torch.randn(2 * 4096, 512, device="cuda").bfloat16()
    activate = SILU_MUL.select(CASE).function
    for rows, given in ((1024, weight), (0, weight), (8192, None)):
        x = torch.randn(rows, 512, device="cuda").bfloat16()
        expected = activate(functional.linear(x, weight))
        assert torch.equal(
            kernel(x, given, lambda rows: functional.linear(rows, weight), activate), expected
        )


def test_a_captured_call_reads_what_the_call_before_it_wrote():
    """Kernels of a graph are launched before the ones ahead of them have ended."""
    torch.manual_seed(0)
    kernel = GATED_LINEAR.select(CASE).function
    weights = [(torch.randn(4096, 2048, device="cuda") / 45).bfloat16() for _ in range(4)]
    x = torch.randn(2100, 2048, device="cuda").bfloat16()

    def chain(synchronize):
        y = x
        for i in range(16):
            y = kernel(y, weights[i % 4], refuse, refuse)
            y = y / y.float().norm(dim=1, keepdim=True).bfloat16() * 45
            if synchronize:
                torch.cuda.synchronize()
        return y

    apart = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = chain(False)
    for _ in range(5):
        together.fill_(NAN)
        graph.replay()
        assert torch.equal(together, apart)
