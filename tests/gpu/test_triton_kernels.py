"""Every Triton kernel on a GPU against its reference in fp32, on random shapes and long contexts.

`tests/kernels/test_triton_*.py` has the cases that the interpreter can also run.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from kernels.pages import Pages
from torch import Tensor

from octavo.kernels import (
    KV_WRITE,
    PAGED_ATTENTION,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SAMPLE_TOKENS,
    SILU_MUL,
    AttentionBatch,
    Case,
    DrawOptions,
)
from octavo.kernels.triton_support import needs_hopper

triton_decode_attention = pytest.importorskip("octavo.kernels.triton_decode_attention")
triton_paged_attention = pytest.importorskip(
    "octavo.kernels.triton_paged_attention"
).triton_paged_attention

hopper_paged_attention = pytest.importorskip(
    "octavo.kernels.hopper_prompt_attention"
).hopper_paged_attention
compile_ahead = pytest.importorskip("octavo.kernels.triton_launch").compile_ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

# Of ‖ours - reference‖ / ‖reference‖; a bf16 result is itself rounded to 2e-3 of its size.
ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 5e-6}
DTYPES = list(ERROR)
HEADS = [(32, 8, 128), (16, 8, 128), (9, 3, 64), (4, 4, 80), (3, 1, 96), (4, 2, 256), (40, 1, 64)]
HOPPER_HEADS = [(32, 8, 128), (16, 8, 128), (4, 4, 64), (64, 1, 128), (8, 1, 64)]
ATTENTIONS = pytest.mark.parametrize("name", ["triton", "hopper"])
VARIANTS = [("triton", dtype, *heads) for dtype in DTYPES for heads in HEADS]
VARIANTS += [("hopper", dtype, *heads) for dtype in DTYPES[:2] for heads in HOPPER_HEADS]
BLOCK_SIZES = [8, 32, 128, 256]
WITH_DTYPES = [("triton", torch.bfloat16), ("triton", torch.float32), ("hopper", torch.bfloat16)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The kernels of most tests, compiled side by side: one after the other they take minutes."""
    on_hopper = needs_hopper(Case("cuda", torch.bfloat16)) is None
    variants = [(name, dtype, heads, 16, 19) for name, dtype, *heads in VARIANTS]
    variants += [(name, dtype, (8, 2, 128), 16, 2) for name, dtype in WITH_DTYPES]
    for name in ("triton", "hopper"):
        variants += [(name, torch.bfloat16, (8, 2, 64), size, 5) for size in BLOCK_SIZES]
        variants += [(name, torch.bfloat16, (heads, 8, 128), 16, 256) for heads in (16, 32)]
    functions = {"triton": triton_paged_attention, "hopper": hopper_paged_attention}
    with compile_ahead(os.cpu_count() or 1):
        for name, dtype, heads, block_size, num_sequences in variants:
            if name == "triton" or on_hopper:
                lengths = [(1, 20)] * (num_sequences - 1) + [(40, 60)]
                pages = Pages(lengths, *heads, dtype, block_size, "cuda")
                functions[name](pages.query, pages.kv_cache, pages.batch, 0.1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _poisoned():
    """New memory holds NaN, so that an output left unwritten shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def chosen(op, dtype: torch.dtype = torch.bfloat16, **sizes: int):
    choice = op.select(Case("cuda", dtype, sizes))
    assert choice.name == "triton", str(choice)
    return choice.function


def attention_named(name: str, dtype: torch.dtype = torch.bfloat16, **sizes: int):
    """One of the two attentions. Those of Hopper's own instructions are skipped elsewhere."""
    if name == "triton":
        return triton_paged_attention
    case = Case("cuda", dtype, sizes)
    if (reason := needs_hopper(case)) is not None:
        pytest.skip(reason)
    choice = PAGED_ATTENTION.select(case)
    assert choice.name == name, str(choice)
    return choice.function


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def close(ours: Tensor, reference: Tensor) -> None:
    assert ours.isfinite().all()
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    assert error < ERROR[ours.dtype], f"relative error {error:.2e}"


def around(page: int) -> int:
    return max(1, 16 * page + random.choice([-1, 0, 1]))


@pytest.mark.parametrize(("name", "dtype", "heads", "kv_heads", "dim"), VARIANTS)
def test_attention_on_random_batches(name, dtype, heads, kv_heads, dim):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    attention = attention_named(name, dtype, **sizes)
    for _ in range(3):
        lengths = [(1, around(random.randint(0, 80))) for _ in range(12)]
        lengths += [(random.randint(2, 40), 40 + around(random.randint(0, 40))) for _ in range(5)]
        lengths += [(n, n) for n in (random.randint(1, 700), around(30))]
        lengths += [(random.randint(200, 400), random.randint(400, 1500)), (0, 33)]
        random.shuffle(lengths)
        pages = Pages(lengths, heads, kv_heads, dim, dtype, device="cuda")
        ours = attention(pages.query, pages.kv_cache, pages.batch, dim**-0.5)
        close(ours, pages.expected(dim**-0.5))


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 20_000), (1, 8192), (1, 8193), (1, 16_385), (1, 1)],
        [(300, 20_000), (1, 20_000)],
        [(1, 2000)] * 40,
        [(1500, 1500)],
    ],
    ids=["long decodes", "long prefill", "many decodes", "prefill"],
)
def test_attention_over_long_contexts(name, dtype, lengths):
    attention = attention_named(name, dtype, head_dim=128)
    pages = Pages(lengths, 8, 2, 128, dtype, device="cuda")
    ours = attention(pages.query, pages.kv_cache, pages.batch, 128**-0.5)
    close(ours, pages.expected(128**-0.5))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@ATTENTIONS
def test_attention_over_other_block_sizes(name, block_size):
    attention = attention_named(name, head_dim=64, block_size=block_size)
    lengths = [(1, 700), (90, 300), (3, 40), (33, 33), (200, 1000)]
    pages = Pages(lengths, 8, 2, 64, torch.bfloat16, block_size, "cuda")
    ours = attention(pages.query, pages.kv_cache, pages.batch, 0.125)
    close(ours, pages.expected(0.125))


@ATTENTIONS
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name):
    attention = attention_named(name, head_dim=128)
    lengths = [(1, 1), (1, 256), (1, 257), (1, 3000), (1, 9000), (600, 900), (4, 5000), (17, 17)]
    pages = Pages(lengths, 32, 8, 128, torch.bfloat16, device="cuda")
    batch = pages.batch
    together = attention(pages.query, pages.kv_cache, batch, 0.1)
    starts = batch.query_starts.tolist()
    for b, (count, context) in enumerate(lengths):
        alone = AttentionBatch(
            torch.tensor([0, count]).int().cuda(),
            batch.context_lens[b : b + 1],
            batch.block_tables[b : b + 1],
            count,
            context,
        )
        rows = slice(starts[b], starts[b + 1])
        assert torch.equal(attention(pages.query[rows], pages.kv_cache, alone, 0.1), together[rows])


def test_a_prompt_has_the_same_bits_however_it_was_cut():
    """As long as no piece is so short that the split kernel takes it."""
    attention = attention_named("triton")
    pages = Pages([(1000, 1000)], 8, 2, 128, torch.bfloat16, device="cuda")
    whole = attention(pages.query, pages.kv_cache, pages.batch, 0.1)
    for cut in (5, 64, 333):
        for first in range(0, 1000 - cut, cut):
            piece = AttentionBatch(
                torch.tensor([0, cut]).int().cuda(),
                torch.tensor([first + cut]).int().cuda(),
                pages.batch.block_tables,
                cut,
                first + cut,
            )
            rows = slice(first, first + cut)
            ours = attention(pages.query[rows], pages.kv_cache, piece, 0.1)
            assert torch.equal(ours, whole[rows]), f"{cut} queries from {first}"


def test_offsets_beyond_two_to_the_31():
    """A cache of 2^32 elements, of which only the last blocks are used."""
    dim, kv_heads, num_blocks = 128, 8, 2**31 // (8 * 16 * 128)
    torch.use_deterministic_algorithms(False)
    cache = torch.empty(2, num_blocks, kv_heads, 16, dim, device="cuda", dtype=torch.bfloat16)
    small = torch.full((2, 5, kv_heads, 16, dim), float("nan"), device="cuda").bfloat16()
    first = num_blocks - 5
    qkv = normal(70, (8 + 16) * dim, dtype=torch.bfloat16)
    query, key, value = (part.unflatten(1, (-1, dim)) for part in qkv.split([8 * dim] * 3, dim=1))
    slots = torch.arange(70, device="cuda")
    chosen(KV_WRITE)(key, value, cache, slots + first * 16)
    KV_WRITE.reference(key, value, small, slots)
    lengths = (torch.tensor([0, 1, 70]).int().cuda(), torch.tensor([70, 70]).int().cuda())
    tables = torch.arange(5).int().cuda().expand(2, 5).contiguous()
    batch = AttentionBatch(*lengths, tables, 69, 70)
    expected = PAGED_ATTENTION.reference(query.float(), small.float(), batch, 0.1)
    far = AttentionBatch(*lengths, tables + first, 69, 70)
    close(triton_paged_attention(query, cache, far, 0.1), expected)
    close(attention_named("hopper", head_dim=dim)(query, cache, far, 0.1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_gates_on_random_shapes(dtype):
    norm, gate = chosen(RMS_NORM, dtype), chosen(SILU_MUL, dtype)
    widths = [1, 7, 576, 1024, 4096, 5120, 16_384, 65_536] + random.sample(range(2, 9000), 6)
    for width in widths:
        rows = random.choice([1, 3, 257, 2000])
        wide = normal(rows, 2 * width + 8, dtype=dtype)
        x, weight, residual = wide[:, :width], normal(width, dtype=dtype), normal(rows, width)
        residual = residual.to(dtype)
        expected = RMS_NORM.reference(x, weight, 1e-5, residual)
        normed, hidden = norm(x, weight, 1e-5, residual.clone())
        assert torch.equal(hidden, expected[1])
        close(normed, RMS_NORM.reference(hidden.float(), weight.float(), 1e-5)[0])
        close(norm(x, weight, 1e-5)[0], RMS_NORM.reference(x.float(), weight.float(), 1e-5)[0])
        halves = wide[:, 3 : 3 + 2 * width]
        close(gate(halves), SILU_MUL.reference(halves.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [*HEADS, (1, 1, 2), (7, 7, 34)])
def test_rotation_norm_and_cache_write_on_random_shapes(dtype, heads, kv_heads, dim):
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    more = (normal(dim, dtype=dtype), normal(dim, dtype=dtype), 1e-6)
    for op, extra in ((ROTARY_KV_WRITE, ()), (QK_NORM_ROTARY_KV_WRITE, more)):
        tokens, block_size = random.choice([1, 64, 1500]), random.choice([8, 16, 48])
        qkv = normal(tokens, sum(sizes), dtype=dtype)
        cache = torch.full((2, 200, kv_heads, block_size, dim), float("nan"), device="cuda")
        slots = torch.randperm(200 * block_size, device="cuda")[:tokens]
        positions = torch.randint(0, 3000, (tokens,), device="cuda")
        angles = torch.rand(3000, dim, device="cuda") * 2 - 1

        def run(
            function,
            as_dtype,
            given=(qkv, cache, positions, angles, slots),
            weights=extra,
        ):
            qkv, cache, positions, angles, slots = given
            qkv, cache = qkv.to(as_dtype, copy=True), cache.to(as_dtype, copy=True)
            views = [part.unflatten(1, (-1, dim)) for part in qkv.split(sizes, dim=1)]
            weights = [w.to(as_dtype) if isinstance(w, Tensor) else w for w in weights]
            function(*views, positions, angles, cache, slots, *weights)
            views[1].zero_()  # what is left there is not said
            return qkv, cache

        ours, ours_cache = run(chosen(op, dtype, head_dim=dim), dtype)
        expected, expected_cache = run(op.reference, torch.float32)
        # A normed element is rounded three times on its way: normed, weighed, turned.
        factor = 3 if extra else 1
        error = (ours.float() - expected).norm() / expected.norm()
        assert error < factor * ERROR[dtype]
        assert torch.equal(ours_cache.isnan(), expected_cache.isnan())
        error = (ours_cache.float() - expected_cache).nan_to_num().norm()
        assert error < factor * ERROR[dtype] * expected_cache.nan_to_num().norm()


@pytest.mark.parametrize("vocabulary", [151_936, 128_256, 49_152, 5003])
def test_sampling(vocabulary):
    sample, rows = chosen(SAMPLE_TOKENS), 200
    logits = 3 * normal(rows, vocabulary)
    ones = torch.ones(rows, device="cuda")
    for temperature, top_k, top_p, min_p in [
        (0.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 50, 1.0, 0.0),
        (1.0, 0, 0.95, 0.0),
        (1.3, 2000, 0.9, 0.001),
        (1.0, 0, 1.0, 0.05),
    ]:
        options = DrawOptions(
            temperature=ones * temperature,
            top_k=(ones * top_k).int(),
            top_p=ones * top_p,
            min_p=ones * min_p,
            seeds=torch.randint(-(2**62), 2**62, (rows,), device="cuda"),
            positions=torch.randint(0, 2**40, (rows,), device="cuda"),
            truncates=(top_k, top_p, min_p) != (0, 1.0, 0.0),
        )
        ours, finite = sample(logits, options)
        assert finite.all()
        # fp32 exponentials against fp64: a number within 1e-7 of a token's border may fall on
        # either side of it, which of 200 draws is never seen twice.
        expected, _ = SAMPLE_TOKENS.reference(logits.double(), options)
        assert (ours != expected).sum() <= 1


def test_draws_follow_the_distribution():
    """200,000 draws of 40 tokens: chi-squared with 39 degrees of freedom, its 1-in-10^6 bound."""
    logits, rows = normal(40), 200_000
    zeros = torch.zeros(rows, device="cuda")
    options = DrawOptions(
        temperature=zeros + 0.7,
        top_k=zeros.int(),
        top_p=zeros + 1,
        min_p=zeros,
        seeds=torch.full((rows,), 7, device="cuda"),
        positions=torch.arange(rows, device="cuda"),
        truncates=False,
    )
    ours, _ = chosen(SAMPLE_TOKENS)(logits.expand(rows, 40).contiguous(), options)
    expected = (logits / 0.7).softmax(-1) * rows
    counts = torch.zeros(40, device="cuda").scatter_add_(0, ours, zeros + 1)
    assert ((counts - expected) ** 2 / expected).sum() < 96


DECODES = [
    [(1, 300), (1, 900)],
    [(0, 1)],
    [(1, 60 * b + 1) for b in range(32)],
    [(1, 20_000)],
    [(1, 1)] * 31,
]
MIXES = [
    [(1, 200)] * 100 + [(300, 700)],
    [(1000, 1000)],
    [(1, 20_000)],
    [(3, 500), (2, 77), (900, 900), (1, 5000)],
    [(1, 100)] * 256,
]


@pytest.mark.parametrize(
    ("batches", "num_sequences", "num_tokens", "longest"),
    [(DECODES, 32, 32, 1), (MIXES, 256, 1024, 1024)],
    ids=["decodes", "mixed"],
)
@pytest.mark.parametrize(
    ("name", "heads"), [("triton", 32), ("triton", 16), ("hopper", 32), ("hopper", 16)]
)
def test_a_graph_captured_at_bounds_serves_smaller_batches(
    batches, num_sequences, num_tokens, longest, name, heads
):
    """Lengths are read on the device, and what a replay counts with is left as it was found."""
    attention = attention_named(name, head_dim=128)
    starts, lengths = (torch.zeros(num_sequences + more).int().cuda() for more in (1, 0))
    tables = torch.zeros(num_sequences, 8192).int().cuda()
    static = AttentionBatch(starts, lengths, tables, longest, 131_072)
    query = torch.zeros(num_tokens, heads, 128, device="cuda").bfloat16()
    cache = torch.zeros(2, 3000, 8, 16, 128, device="cuda").bfloat16()
    attention(query, cache, static, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(query, cache, static, 0.1)  # one layer after the other
        out = attention(query, cache, static, 0.1)
    for lengths_of in [*batches, batches[0]]:
        pages = Pages(lengths_of, heads, 8, 128, torch.bfloat16, device="cuda")
        batch, count, real = pages.batch, len(pages.query), len(lengths_of)
        starts.fill_(count)[: real + 1] = batch.query_starts
        lengths.zero_()[:real] = batch.context_lens
        tables.fill_(2**30)[:real, : batch.block_tables.shape[1]] = batch.block_tables
        cache.fill_(float("nan"))[:, : pages.kv_cache.shape[1]] = pages.kv_cache
        query.fill_(float("nan"))[:count] = pages.query
        out.fill_(float("nan"))
        graph.replay()
        assert not out[count:].any(), "tokens of no sequence get zeros"
        if count:
            close(out[:count], pages.expected(0.1))
            alone = attention(pages.query, pages.kv_cache, batch, 0.1)
            assert torch.equal(out[:count], alone), f"{real} sequences"


def test_who_adds_the_parts_changes_no_bit(monkeypatch):
    """From tiles of 64 tokens to whole contexts, as one program's work."""
    attention = attention_named("triton")
    for heads in (32, 16):
        lengths = [(1, 20_000), (1, 3000), (1, 640), (2, 8193), (1, 40_000)]
        pages = Pages(lengths, heads, 8, 128, torch.bfloat16, device="cuda")
        results = []
        for fill, part_bytes in ((1e3, 1 << 30), (6, 1 << 30), (0.5, 1 << 30), (0, 0)):
            monkeypatch.setattr(triton_decode_attention, "ENOUGH_PER_MULTIPROCESSOR", fill)
            monkeypatch.setattr(triton_decode_attention, "PART_BYTES", part_bytes)
            results.append(attention(pages.query, pages.kv_cache, pages.batch, 0.1))
        close(results[0], pages.expected(0.1))
        assert all(torch.equal(result, results[0]) for result in results)
