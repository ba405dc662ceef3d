"""Triton's kernels with the options of Gemma, compiled for a GPU that need not be here.

The interpreter of the other tests accepts what the compiler does not. They run in tests/gpu.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: where Triton interprets, as it does in these tests, nothing is compiled.
COMPILE = """
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.kernels.triton_decode_attention import _attend as decode
from octavo.kernels.triton_gated_activations import _gate
from octavo.kernels.triton_encoder_attention import TILES
from octavo.kernels.triton_encoder_attention import _attend as encoder
from octavo.kernels.triton_lora import _expand, _shrink
from octavo.kernels.triton_paged_attention import _attend as prompt
from octavo.kernels.triton_rms_norm import _rms_norm
from octavo.kernels.triton_rotary_kv_write import _rotary_kv_write

heads = dict(KV_HEADS=2, GROUP=4, BLOCK_SIZE=16, DIM=64, DIM_PAD=64, PRECISION="tf32")
few = dict(BATCH_PAD=16, ROWS=16, ROW_TILES=1, MAX_QUERIES=4, KEYS_LOG=6, CHUNK_LOG=8,
           SPLIT_LOG=10, MAX_SPLITS=32, AT_ONCE=4, GROUP_PAD=4)
many = dict(BATCH_PAD=128, ROWS=128, KEYS=64, FEW_QUERIES=4)
turn = dict(HEADS=8, KV_HEADS=2, BLOCK_SIZE=16, DIM=64, HALF_PAD=32, AT_ONCE=16, QUERY_PROGRAMS=1,
            ROTARY_DIM=64, NORM=True)
ROWS, KEYS, _, _ = TILES[2, 128]
segments = dict(ROWS=ROWS, KEYS=KEYS, DIM=80, PADDED=128, PRECISION="tf32")
lora = dict(BLOCK_T=32, BLOCK_R=16)
shrink = dict(ROWS=48, DEPTH=4096, SPLIT=512, BLOCKS=3, BLOCK_K=64) | lora
expand = dict(RANK=16, PARTS=3, SPLITS=8, FIRST=4096, SECOND=1024, THIRD=1024, BLOCK_N=128) | lora
constants = {
    "shrink": (_shrink, shrink), "expand": (_expand, expand),
    "encoder": (encoder, segments),
    "decode": (decode, heads | few), "prompt": (prompt, heads | many),
    "norm": (_rms_norm, dict(WIDTH=576, PADDED=1024, HAS_RESIDUAL=True)),
    "rotation": (_rotary_kv_write, turn), "gate": (_gate, dict(WIDTH=576, STRETCH=1024)),
}
bf16 = "query key value kv_cache out x residual normed a b y"
fp32 = "parts tops sums cos_sin weight query_weight key_weight shrunk"
kinds = {name: "*bf16" for name in bf16.split()}
kinds |= {name: "*fp32" for name in fp32.split()}
lengths = "query_starts key_starts context_lens block_tables arrivals"
kinds |= {name: "*i32" for name in lengths.split()}
kinds |= {"order": "*i32", "table": "*i32"}
kinds |= {"positions": "*i64", "slots": "*i64", "scale_log2": "fp32", "eps": "fp32"}

for name, options in json.loads(sys.argv[1]):
    kernel, sizes = constants[name]
    names = kernel.arg_names
    sizes = sizes | options | {"PDL": True}
    if name in ("decode", "prompt"):
        sizes = {"WINDOW": 0, "CAP_SCALE": 0.0, "CAUSAL": True} | sizes
    signature = {n: "constexpr" if n in sizes else kinds.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in sizes.items()})
    options = dict(num_warps=4, num_stages=2)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(ptx.count("mma"))
"""


def num_products(directory, *kernels):
    """Matrix instructions of each (kernel, constants that differ)."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(kernels)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(map(int, done.stdout.split()))


def test_attention_in_windows_compiles(tmp_path):
    window = {"WINDOW": 100, "CAP_SCALE": 0.01}
    asked = [("decode", window), ("prompt", window), ("prompt", {"CAUSAL": False})]
    decode, prompt, bidirectional = num_products(tmp_path, *asked)
    assert decode > 0
    # Three loops over keys: where windows begin, where all rows see all, and up to the diagonal.
    assert prompt * 2 == bidirectional * 3


def test_norms_with_wide_weights_and_gelu_compile(tmp_path):
    num_products(tmp_path, ("norm", {}), ("rotation", {}), ("gate", {"GELU": True}))


def test_attention_within_segments_compiles(tmp_path):
    padded, plain, small = num_products(
        tmp_path, ("encoder", {}), ("encoder", {"DIM": 128}), ("encoder", {"DIM": 64, "PADDED": 64})
    )
    # Scores and values, each in two loops: full tiles, and the last one.
    assert padded == plain > 0 and small > 0


def test_lora_compiles(tmp_path):
    deep = {"RANK": 100, "BLOCK_R": 64}
    found = num_products(tmp_path, ("shrink", {}), ("expand", {}), ("expand", deep))
    assert all(found)
