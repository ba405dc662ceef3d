"""Triton's matrix products: in its interpreter, or on a GPU. And which block sizes they get."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

pytest.importorskip("triton")

from octavo.errors import ConfigError
from octavo.kernels import LINEAR, Case, block_sizes
from octavo.kernels.block_sizes import (
    ROW_BUCKETS,
    SHARED_BYTES,
    Blocks,
    as_entry,
    bucket,
    formula,
    invariant_plan,
    merged,
    plan_for,
    read_table,
    shared_bytes,
    write_table,
)
from octavo.kernels.linear import INVARIANT_SHARED_KIB
from octavo.kernels.triton_linear import (
    FASTEST,
    INVARIANT,
    MOST_ROWS,
    PART_UNIT,
    TritonWeight,
    multiply,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply bf16 matrices, and cuts bf16 off where a GPU rounds.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
HALVES = [torch.bfloat16, torch.float16]
GEMM_DTYPES = HALVES if DEVICE == "cuda" else [torch.float16]
# Of the largest result.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALL = Blocks("gemm", 16, 16, 16)


@pytest.fixture(autouse=True)
def _own_table(tmp_path, monkeypatch):
    """No table of the machine's user."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    clear()
    yield
    clear()


def clear() -> None:
    plan_for.cache_clear()
    block_sizes._tables.cache_clear()


def normal(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    bias = None if bias is None else bias.float()
    expected = functional.linear(x.float(), weight.float(), bias)
    tolerance = TOLERANCE[ours.dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance / 2 * scale)


def weight_for(weight: Tensor, blocks: Blocks) -> TritonWeight:
    return TritonWeight(weight, (blocks,) * len(ROW_BUCKETS), blocks)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (5, 33), (40, 200), (17, 128)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gemv(poisoned, dtype, outputs, depth, rows):
    shapes = ((rows, depth), (outputs, depth), (outputs,))
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in shapes)
    for wide in (64, 256) if rows == 1 else (256,):  # in several steps, and in one
        for tall in (1, 4):
            prepared = weight_for(weight, Blocks("gemv", tall, wide, 8 if rows > 1 else 1))
            close(multiply(x, prepared, None, prepared.beyond), x, weight)
            close(multiply(x, prepared, bias, prepared.beyond), x, weight, bias)


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (5, 33), (40, 208), (17, 128)])
@pytest.mark.parametrize("rows", [1, 15, 37])
def test_gemm(poisoned, dtype, outputs, depth, rows):
    shapes = ((rows, depth), (outputs, depth), (outputs,))
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in shapes)
    ways = [replace(SMALL, splits=n, spread=s) for n, s in ((1, True), (3, True), (3, False))]
    for blocks in (*ways, Blocks("held", 16, 64, 16), Blocks("held", 16, 256, 64)):
        prepared = weight_for(weight, blocks)
        for _ in range(2):  # the second finds the counters as the first did
            close(multiply(x, prepared, None, prepared.beyond), x, weight)
        assert not prepared.arrivals.any()
        close(multiply(x, prepared, bias, prepared.beyond), x, weight, bias)


def test_parts_of_k_give_the_same_bits_spread_or_not():
    x, weight = normal(20, 200), normal(40, 200)
    apart = weight_for(weight, replace(SMALL, splits=4))
    alone = weight_for(weight, replace(SMALL, splits=4, spread=False))
    assert torch.equal(
        multiply(x, apart, None, apart.beyond), multiply(x, alone, None, alone.beyond)
    )


@pytest.mark.parametrize("linear", [FASTEST, INVARIANT], ids=["fastest", "invariant"])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 70])
def test_every_number_of_rows(poisoned, linear, rows):
    x, weight, bias = normal(rows, 80), normal(100, 80), normal(100)
    prepared = linear.prepare(weight)
    assert (prepared.out_features, prepared.in_features) == (100, 80)
    ours = linear.apply(x, prepared, bias)
    assert ours.shape == (rows, 100)
    if rows:
        close(ours, x, weight, bias)


@pytest.mark.parametrize("linear", [FASTEST, INVARIANT], ids=["fastest", "invariant"])
def test_more_rows_than_the_table_has(linear):
    rows = MOST_ROWS + 1
    x, weight = normal(rows, 64), normal(33, 64)
    close(linear.apply(x, linear.prepare(weight), None), x, weight)


@pytest.mark.parametrize("rows", [1, 3, 18])
def test_strided_rows_are_read_and_nothing_beside_them(rows):
    wide = torch.full((rows, 200), float("nan")).to(DEVICE, HALF)
    wide[:, 10:60] = normal(rows, 50)
    x, weight = wide[:, 10:60], normal(48, 50)
    for linear in (FASTEST, INVARIANT):
        close(linear.apply(x, linear.prepare(weight), None), x, weight)
    split = weight_for(weight, replace(SMALL, splits=2))
    close(multiply(x, split, None, split.beyond), x, weight)


def test_invariant_rows_have_the_same_bits_alone_and_in_a_batch():
    x, weight = normal(300, 1100), normal(70, 1100)
    prepared = INVARIANT.prepare(weight)
    assert prepared.beyond.splits > 1
    whole = INVARIANT.apply(x, prepared, None)
    for count in (1, 2, 16, 17, 64, 100, 256) if DEVICE == "cuda" else (257, 290):
        # The interpreter multiplies a whole tile at once, in an order that depends on its size and
        # on the place of a row in it.
        rows = slice(-count, None) if DEVICE == "cuda" else slice(count)
        assert torch.equal(INVARIANT.apply(x[rows], prepared, None), whole[rows])


def test_the_weight_stays_as_it_is():
    weight, ids = normal(20, 48), torch.tensor([3, 0, 19, 3]).to(DEVICE)
    for linear in (FASTEST, INVARIANT):
        prepared = linear.prepare(weight)
        assert linear.unpack(prepared) is weight
        assert torch.equal(linear.gather_rows(prepared, ids), weight[ids])
    view = normal(48, 20).t()
    assert torch.equal(FASTEST.unpack(FASTEST.prepare(view)), view)


def test_linear_refuses_what_it_would_misread():
    prepared = FASTEST.prepare(normal(16, 32))
    with pytest.raises(ValueError, match="32"):
        FASTEST.apply(normal(2, 31), prepared, None)
    with pytest.raises(ValueError, match=f"{HALF}"):
        FASTEST.apply(normal(2, 32).float(), prepared, None)
    with pytest.raises(ValueError, match="dense rows"):
        FASTEST.apply(normal(32, 2).t(), prepared, None)
    with pytest.raises(ValueError, match="bias"):
        FASTEST.apply(normal(2, 32), prepared, normal(15))
    with pytest.raises(ValueError, match="bf16 or fp16"):
        FASTEST.prepare(normal(16, 32).float())
    few = Blocks("gemv", 1, 16)
    with pytest.raises(ValueError, match="do not fit"):
        multiply(normal(2, 32), weight_for(normal(16, 32), few), None, few)


def test_which_linear_a_layer_gets(monkeypatch):
    monkeypatch.setattr("octavo.kernels.triton_support._missing", lambda: None)
    plain, invariant = {}, {"batch_invariant": 1}
    assert LINEAR.select(Case("cuda", torch.bfloat16, plain)).name == "triton"
    assert LINEAR.select(Case("cuda", torch.float16, invariant)).name == "triton-invariant"
    choice = LINEAR.select(Case("cuda", torch.float32, invariant))
    assert choice.name == "reference"
    reasons = dict(LINEAR.select(Case("cuda", torch.float32, plain)).passed_over)
    assert "batch invariance was not asked for" in reasons["triton-invariant"]
    assert "float32" in reasons["triton"]
    assert "depend on the batch" in dict(choice.passed_over)["triton"]
    assert LINEAR.select(Case("cpu", torch.bfloat16, invariant)).name in ("native", "reference")


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_a_bucket_holds_its_rows(rows):
    index = bucket(rows)
    assert rows <= ROW_BUCKETS[index]
    assert index == 0 or rows > ROW_BUCKETS[index - 1]


def powers_of_2(blocks: Blocks) -> bool:
    sizes = (blocks.outputs, blocks.depth, blocks.rows, blocks.warps)
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


def fits(blocks: Blocks, room: int = SHARED_BYTES) -> bool:
    held = blocks.kernel == "held" and blocks.outputs * blocks.depth > 256 * 32 * blocks.warps
    return shared_bytes(blocks) <= room and not held


@pytest.mark.parametrize("outputs", [1, 1000, 4096, 151_936])
@pytest.mark.parametrize("depth", [1, 31, 576, 1024, 14_336])
def test_the_formula_gives_blocks_for_every_shape(outputs, depth):
    for rows in ROW_BUCKETS:
        for blocks in (formula(outputs, depth, rows), formula(outputs, depth, rows, 20)):
            assert blocks is None or (powers_of_2(blocks) and fits(blocks) and blocks.splits >= 1)
    plan, beyond = invariant_plan(outputs, depth)
    assert {b.splits for b in (*plan, beyond)} == {beyond.splits}
    assert all(PART_UNIT % b.depth == 0 for b in (*plan, beyond))  # or they would cut K elsewhere
    assert all(powers_of_2(b) and fits(b, INVARIANT_SHARED_KIB << 10) for b in (*plan, beyond))


def test_a_gpu_with_little_shared_memory_gets_what_fits(monkeypatch):
    class Properties:
        name, multi_processor_count, major, minor = "small", 80, 8, 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    plan = plan_for("cuda:0", 1024, 2048)
    assert plan[0] is not None and None in plan[:7]
    assert all(blocks is None or fits(blocks, 99 << 10) for blocks in plan)


def test_the_shipped_table_is_sound():
    table = read_table(block_sizes.SHIPPED)
    assert "NVIDIA H100 80GB HBM3" in table
    for shapes in table.values():
        for shape, entries in shapes.items():
            assert len(shape.split("x")) == 2
            assert list(entries) == [str(rows) for rows in ROW_BUCKETS]
            for rows, entry in entries.items():
                blocks = entry and Blocks(**entry)
                assert blocks is None or (powers_of_2(blocks) and fits(blocks))
                assert blocks is None or blocks.kernel == "gemm" or blocks.rows >= int(rows)


def test_the_users_table_comes_first(tmp_path, monkeypatch):
    class Properties:
        name, multi_processor_count, major, minor = "NVIDIA H200", 132, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    shipped = plan_for("cuda:0", 4096, 4096)
    own = Blocks("gemv", 1, 512)
    row = {"4096x4096": {"1": as_entry(own), "2": None}}
    # The H100's table stands in for the H200's; one of its own stands before that.
    write_table(tmp_path / "block_sizes.json", {"NVIDIA H100 80GB HBM3": row})
    clear()
    assert plan_for("cuda:0", 4096, 4096) == (own, *[None] * 8)
    assert plan_for("cuda:0", 4096, 4097) == tuple(formula(4096, 4097, t) for t in ROW_BUCKETS)
    (tmp_path / "block_sizes.json").unlink()
    clear()
    assert plan_for("cuda:0", 4096, 4096) == shipped


def test_tables_are_written_as_they_are_read(tmp_path):
    path = tmp_path / "deep" / "table.json"
    blocks = Blocks("gemm", 64, 128, 16, splits=3)
    old = {"one": {"8x16": {"1": None}}, "two": {"8x16": {"1": None}}}
    new = {"one": {"16x8": {"1": as_entry(blocks)}, "8x16": {"2": None}}}
    table = merged(old, new)
    write_table(path, table)
    assert read_table(path) == table == json.loads(path.read_text())
    assert table["one"]["8x16"] == {"2": None} and table["two"] == old["two"]
    assert as_entry(blocks) == dict(kernel="gemm", outputs=64, depth=128, rows=16, splits=3)


@pytest.mark.parametrize("text", ["{", '{"gpu": {"8x8": {"1": {"kernel": "gemv"}}}}', "[]", '"x"'])
def test_a_broken_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="table.json"):
        read_table(path)
