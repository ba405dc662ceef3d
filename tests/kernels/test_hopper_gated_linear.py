"""The gated product in Gluon: compiled for a GPU that need not be here. It runs in tests/gpu.

Where it does not run, GATED_LINEAR is a product and its activation: that is held to the paper here.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional

from octavo.kernels import GATED_LINEAR, Case
from octavo.kernels.gated_activations import reference_silu_mul
from octavo.kernels.gated_linear import reference_gated_linear

# In a process of its own: where Triton interprets, as it does in these tests, nothing is compiled.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from octavo.kernels.hopper_gated_linear import GROUP, STAGES, TILE_LAYOUT, _gated_linear

constants = dict(STAGES=STAGES, GROUP=GROUP, PDL=True)
kinds = dict(
    x=f"tensordesc<bf16[64, 64],{TILE_LAYOUT!r}>",
    weight=f"tensordesc<bf16[128, 64],{TILE_LAYOUT!r}>",
    out=f"tensordesc<bf16[64, 128],{TILE_LAYOUT!r}>",
)
names = _gated_linear.arg_names
signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
source = GluonASTSource(
    _gated_linear, signature, {(names.index(n),): value for n, value in constants.items()}
)
options = dict(num_warps=4, num_stages=1)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
ptx = compiled.asm["ptx"]
print(ptx.count("wgmma.mma_async"), ptx.count("m64n256k16"), compiled.metadata.shared)
"""
SHARED_BYTES = 227 * 1024  # of a Hopper's multiprocessor, for one program


def test_it_compiles_to_hoppers_own_instructions(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    num_products, num_widest, shared_bytes = map(int, done.stdout.split())
    # Two warpgroups; a step of 64 inputs is four instructions, each as wide as they get.
    assert num_products == num_widest == 2 * 4
    assert shared_bytes <= SHARED_BYTES


def test_the_reference_is_swiglu():
    torch.manual_seed(0)
    x, gate, up = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6, 8)
    weight = torch.cat([gate, up])
    ours = reference_gated_linear(
        x, weight, lambda rows: functional.linear(rows, weight), reference_silu_mul
    )
    # arXiv 2002.05202, equation 6: Swish(x W) ⊗ x V, with Swish(y) = y sigmoid(y).
    expected = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ({"batch_invariant": 1}, torch.bfloat16, "its bits depend on the batch"),
        ({"bias": 1}, torch.bfloat16, "without a bias"),
        ({}, torch.float32, "16-bit values"),
        ({"size": 1028}, torch.bfloat16, "that 8 divides"),
        ({"in_features": 100}, torch.float16, "that 8 divides"),
    ],
)
def test_what_one_kernel_cannot_do_is_refused_by_name(sizes, dtype, reason):
    known = {"size": 1024, "in_features": 512, "bias": 0}
    choice = GATED_LINEAR.select(Case("cuda", dtype, known | sizes))
    assert choice.name == "reference" and reason in dict(choice.passed_over)["hopper"]
