"""The prompt attention in Gluon: compiled for a GPU that need not be here. It runs in tests/gpu."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: where Triton interprets, as it does in these tests, nothing is compiled.
COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from octavo.kernels.hopper_prompt_attention import TILE_LAYOUT, _attend

dim, block_size = map(int, sys.argv[1:])
constants = dict(BATCH_PAD=512, ROWS=128, KEYS=128, STAGES=2, FEW_QUERIES=16, KV_HEADS=2,
                 GROUP=4, BLOCK_SIZE=block_size, DIM=dim, PDL=True)
kinds = dict(
    queries=f"tensordesc<bf16[16, 4, {dim}],{TILE_LAYOUT!r}>",
    lines=f"tensordesc<bf16[1, {min(block_size, 128)}, {dim}],{TILE_LAYOUT!r}>",
    out="*bf16", scale_log2="fp32", query_starts="*i32", context_lens="*i32", block_tables="*i32",
)
names = _attend.arg_names
signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
source = GluonASTSource(
    _attend, signature, {(names.index(n),): value for n, value in constants.items()}
)
options = dict(num_warps=4, num_stages=1)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
print(ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"))
"""


@pytest.mark.parametrize(("head_dim", "block_size"), [(128, 16), (64, 256)])
def test_it_compiles_to_hoppers_own_instructions(head_dim, block_size, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(head_dim), str(block_size)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    num_products, num_copies = map(int, done.stdout.split())
    # Two warpgroups: a product of keys before the loop, one of each in it, one of values after it.
    assert num_products == 2 * 2 * (head_dim // 16 + 128 // 16)
    # Queries of both, keys and values; 64 numbers wide each.
    assert num_copies == head_dim // 64 * (2 + 2 * max(1, 128 // block_size))
