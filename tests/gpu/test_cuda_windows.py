"""Windows, softcaps, gelu and norms around one on an NVIDIA GPU: kernels, and Gemma as a whole."""

from __future__ import annotations

import os

import pytest
import torch
from kernels.pages import Pages
from torch import Tensor

from octavo import LLM, SamplingParams
from octavo.kernels import (
    GELU_TANH_MUL,
    PAGED_ATTENTION,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    AttentionKind,
    Case,
)
from octavo.testing.tiny_models import write_tiny_model

pytest.importorskip("triton")

from octavo.kernels.triton_launch import compile_ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

# Of ‖ours - reference‖ / ‖reference‖; a bf16 result is itself rounded to 2e-3 of its size.
ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 5e-6}
KINDS = [
    AttentionKind(window=1),
    AttentionKind(window=300),
    AttentionKind(window=4096, softcap=50.0),
    AttentionKind(softcap=2.0),
    AttentionKind(causal=False),
]
LENGTHS = [(1, 20_000), (1, 4097), (1, 64), (3, 700), (500, 9000), (1500, 1500), (17, 17), (0, 33)]
# Each kind with two of these: all of both would take minutes to compile.
DTYPES_AND_DIMS = [(torch.bfloat16, 256), (torch.float16, 64), (torch.float32, 64)]
ATTENTIONS = [
    (kind, *DTYPES_AND_DIMS[(index + more) % len(DTYPES_AND_DIMS)])
    for index, kind in enumerate(KINDS)
    for more in range(2)
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 7, 20, 21, 150)
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned():
    """New memory holds NaN, so that an output left unwritten shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def close(ours: Tensor, reference: Tensor) -> None:
    assert ours.isfinite().all()
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    assert error < ERROR[ours.dtype], f"relative error {error:.2e}"


def chosen(op, dtype: torch.dtype, name: str = "triton", **sizes: int):
    choice = op.select(Case("cuda", dtype, sizes))
    assert choice.name == name, str(choice)
    return choice.function


def attentions(kind: AttentionKind, dtype: torch.dtype, dim: int):
    """(the usual kernel's result, that of the one that is batch-invariant, the batch)"""
    pages = Pages(LENGTHS, 8, 4, dim, dtype, device="cuda", kind=kind)
    sizes = {"head_dim": dim, **kind.sizes()}
    usual = chosen(PAGED_ATTENTION, dtype, **sizes)
    invariant = chosen(PAGED_ATTENTION, dtype, "triton-invariant", batch_invariant=1, **sizes)
    return *(
        attention(pages.query, pages.kv_cache, pages.batch, dim**-0.5, kind)
        for attention in (usual, invariant)
    ), pages


@pytest.fixture(scope="module")
def _compiled() -> None:
    """All kernels of the test below, side by side."""
    with compile_ahead(os.cpu_count() or 1):
        for case in ATTENTIONS:
            attentions(*case)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("kind", "dtype", "dim"), ATTENTIONS, ids=str)
def test_every_kind_of_attention(kind, dtype, dim):
    usual, invariant, pages = attentions(kind, dtype, dim)
    expected = pages.expected(dim**-0.5)
    close(usual, expected)
    close(invariant, expected)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("width", [1, 576, 4097, 16_384])
def test_gelu_and_norms_with_wide_weights(dtype, width):
    x, weight, residual = normal(300, 2 * width, dtype=dtype), normal(width), normal(300, width)
    halves = GELU_TANH_MUL.reference(x.float())
    close(chosen(GELU_TANH_MUL, dtype)(x), halves)
    norm, residual = chosen(RMS_NORM, dtype), residual.to(dtype)
    expected = RMS_NORM.reference(x[:, :width], weight, 1e-6, residual)
    normed, hidden = norm(x[:, :width], weight, 1e-6, residual.clone())
    assert torch.equal(hidden, expected[1])
    close(normed, RMS_NORM.reference(hidden.float(), weight, 1e-6)[0])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_qk_norm_with_wide_weights(dtype):
    qkv, weights = normal(50, 8 * 64, dtype=dtype), (normal(64), normal(64))
    positions = torch.randint(0, 99, (50,), device="cuda")
    angles, slots = torch.rand(99, 64, device="cuda") * 2 - 1, torch.arange(50, device="cuda")

    def run(op, given, as_dtype):
        cache = torch.zeros(2, 4, 2, 16, 64, dtype=as_dtype, device="cuda")
        views = [part.unflatten(1, (-1, 64)) for part in given.split([256, 128, 128], dim=1)]
        op(*views, positions, angles, cache, slots, *weights, 1e-6)
        return views[0], cache

    sizes = {"head_dim": 64, "rotary_dim": 64}
    ours = run(chosen(QK_NORM_ROTARY_KV_WRITE, dtype, **sizes), qkv.clone(), dtype)
    expected = run(QK_NORM_ROTARY_KV_WRITE.reference, qkv.float(), torch.float32)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_fp32_tokens_on_the_gpu_are_those_of_the_cpu(tmp_path, architecture):
    write_tiny_model(tmp_path / "tiny", architecture)

    def answers(device, **options):
        memory = {"kv_cache_memory_bytes": 2**24, "dtype": "float32"}
        llm = LLM(str(tmp_path / "tiny"), device=device, **memory, **options, check_integrity=True)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    on_cpu = answers("cpu")
    assert answers("cuda") == on_cpu
    assert answers("cuda", max_num_batched_tokens=13, enforce_eager=True) == on_cpu
