"""Matrix products of few rows in Triton: bound by reading the weight, once and at full speed.

Owns the kernels and their launch; `block_sizes` owns the choice among them. Two habits set the
speed. A product is transposed, so that the weight is the tall operand of the matrix instructions
and few rows waste none of them. And the weight, which no kernel writes, is asked for before the
kernel waits for its inputs, while the kernel before it still runs.

Sums are fp32 in a fixed order, rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.block_sizes import (
    Blocks,
    Plan,
    bucket,
    invariant_plan,
    partial_tiles,
    plan_for,
)
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs
from octavo.kernels.triton_support import refuse

MOST_ROWS = 256  # of block_sizes.ROW_BUCKETS
PART_UNIT = 128  # parts of K are cut between so many, whatever the depth of a block that divides it
LINE = tl.constexpr(64)  # weights in the 128 bytes that the L2 cache fetches
LINES = tl.constexpr(8)  # lines of one KiB
GROUP = tl.constexpr(8)  # tiles of rows beside which a tile of the weight is used again


class TritonWeight:
    """A weight [N, K] as it is, so that a tied embedding reads it too, and how to multiply by it.

    arrivals counts, for each tile of the result, the programs that have made their part of K. The
    last one sets it back to 0: two products by one weight must not run at once on two streams.
    """

    __slots__ = ("arrivals", "beyond", "in_features", "out_features", "plain", "plan")

    def __init__(self, weight: Tensor, plan: Plan, beyond: Blocks | None):
        self.plain = weight
        self.out_features, self.in_features = weight.shape
        self.plan = plan
        self.beyond = beyond  # for more than MOST_ROWS rows; None: torch's own product
        tiles = partial_tiles(plan, self.out_features)
        self.arrivals = torch.zeros(tiles, dtype=torch.int32, device=weight.device)


class TritonLinear:
    """Linear on a GPU in bf16 and fp16, fast for few rows; for many it is torch's own."""

    def prepare(self, weight: Tensor) -> TritonWeight:
        return TritonWeight(_plain(weight), plan_for(str(weight.device), *weight.shape), None)

    def apply(self, x: Tensor, prepared: TritonWeight, bias: Tensor | None) -> Tensor:
        rows = x.shape[0]
        blocks = prepared.beyond
        if rows <= MOST_ROWS and rows:
            blocks = prepared.plan[bucket(rows)]
        if blocks is None or not rows:
            return functional.linear(x, prepared.plain, bias)
        return multiply(x, prepared, bias, blocks)

    def unpack(self, prepared: TritonWeight) -> Tensor:
        return prepared.plain

    def gather_rows(self, prepared: TritonWeight, ids: Tensor) -> Tensor:
        return functional.embedding(ids, prepared.plain)


class InvariantLinear(TritonLinear):
    """As TritonLinear, but a row has the same bits alone and in a batch of any size.

    Every sum takes its K in one order, cut into the same parts, with the same depth of matrix
    instruction. How many rows and outputs stand beside it in a tile may differ, as the hardware
    makes each element from its own row and column alone; tests/gpu holds it to that.
    """

    def prepare(self, weight: Tensor) -> TritonWeight:
        return TritonWeight(_plain(weight), *invariant_plan(*weight.shape))


FASTEST, INVARIANT = TritonLinear(), InvariantLinear()


def _plain(weight: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16):
        raise refuse("linear", "weight is [N, K] bf16 or fp16", weight=weight)
    return weight.contiguous()


def multiply(x: Tensor, prepared: TritonWeight, bias: Tensor | None, blocks: Blocks) -> Tensor:
    """x [T, K] (rows may be strided) -> [T, N], in these blocks. T is at least 1."""
    rows, depth = x.shape
    weight, outputs = prepared.plain, prepared.out_features
    if x.dtype is not weight.dtype or depth != prepared.in_features or x.stride(1) != 1:
        rule = f"x is [T, {prepared.in_features}] {weight.dtype} with dense rows"
        raise refuse("linear", rule, x=x)
    if bias is not None and (
        bias.shape != (outputs,) or bias.dtype is not weight.dtype or not bias.is_contiguous()
    ):
        raise refuse("linear", f"bias is [{outputs}] {weight.dtype}", bias=bias)
    out = x.new_empty(rows, outputs)
    tensors = (x, weight, weight if bias is None else bias, out)
    tiles = triton.cdiv(outputs, blocks.outputs)
    sizes = (rows, outputs, depth, x.stride(0) if rows > 1 else depth)
    flags = {"HAS_BIAS": bias is not None, "num_warps": blocks.warps, **launch_options()}
    flags |= {"BLOCK_N": blocks.outputs, "BLOCK_K": blocks.depth}
    if blocks.kernel == "gemv":
        in_one = depth <= blocks.depth
        if rows > blocks.rows or (blocks.rows > 1 and not in_one):
            raise refuse("linear", f"{blocks} do not fit", x=x)
        launch(_gemv, (tiles,))(*tensors, *sizes, ROWS=blocks.rows, IN_ONE=in_one, **flags)
        return out
    parts = triton.cdiv(depth, blocks.depth) if blocks.kernel == "held" else blocks.splits
    tiles *= triton.cdiv(rows, blocks.rows)
    spread = parts > 1 and blocks.spread
    unit = blocks.depth if blocks.kernel == "held" else max(blocks.depth, PART_UNIT)
    partials = out
    if spread:
        sums = parts * tiles * blocks.outputs * blocks.rows
        partials = torch.empty(sums, dtype=torch.float32, device=x.device)
    launch(_gemm, (tiles, parts if spread else 1))(
        *tensors,
        partials,
        prepared.arrivals,
        *sizes,
        parts,
        triton.cdiv(depth, unit * parts) * unit // blocks.depth,
        blocks.prefetch,
        BLOCK_T=blocks.rows,
        HELD=blocks.kernel == "held",
        SPREAD=spread,
        IN_PARTS=parts > 1,
        WHOLE_K=depth % blocks.depth == 0,
        num_stages=blocks.stages,
        **flags,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gemv(
    x,
    weight,
    bias,
    out,
    num_rows,
    N,
    K,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program makes BLOCK_N outputs of all rows."""
    allow_next(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the last row of the weight lies the last row again: read, and not stored.
    weights = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    w = tl.load(weights + k[None, :], mask=k[None, :] < K, other=0.0)
    wait_for_inputs(PDL)
    if IN_ONE:
        loaded = ()  # all, before the first sum: its barriers would hold the next load back
        for t in tl.static_range(ROWS):
            place = tl.minimum(t, num_rows - 1).to(tl.int64) * x_stride
            row = tl.load(x + place + k, mask=k < K, other=0.0)
            loaded = loaded + (row,)  # type: ignore[assignment]
    else:
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for first in range(0, K, BLOCK_K):
            behind = first + BLOCK_K + k
            later = tl.load(weights + behind[None, :], mask=behind[None, :] < K, other=0.0)
            row = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            products += row[None, :] * w.to(tl.float32)
            w = later
    for t in tl.static_range(ROWS):
        if IN_ONE:
            products = loaded[t].to(tl.float32)[None, :] * w.to(tl.float32)
        sums = tl.sum(products, axis=1)
        if HAS_BIAS:
            sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        there = (n < N) & (t < num_rows)
        tl.store(out + t * N + n, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def _prefetch(addresses):
    """Asks the L2 cache for lines."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _sum_over_k(
    weights,
    xs,
    there,
    first,
    last,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """weights [BLOCK_N, 1] and xs [1, BLOCK_T] point to rows: their products over first..last.

    there [1, BLOCK_T] says which rows of x there are.
    """
    k = tl.arange(0, BLOCK_K)
    weights = weights + k[None, :]
    xs = xs + k[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(first, last, BLOCK_K):
        if WHOLE_K:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=there, other=0.0)
        else:
            w = tl.load(weights + start, mask=start + k[None, :] < K, other=0.0)
            x = tl.load(xs + start, mask=there & (start + k[:, None] < K), other=0.0)
        sums = tl.dot(w, x, sums)
    return sums


@triton.jit(do_not_specialize=["num_rows", "num_parts", "part_blocks", "num_kib"])
def _gemm(
    x,
    weight,
    bias,
    out,
    partials,
    arrivals,
    num_rows,
    N,
    K,
    x_stride,
    num_parts,
    part_blocks,
    num_kib,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    SPREAD: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program makes a tile [BLOCK_N, BLOCK_T] of the transposed result, or its part of K."""
    allow_next(PDL)
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    num_t = tl.minimum(tl.cdiv(num_rows, BLOCK_T) - group * GROUP, GROUP)
    in_group = tile % (GROUP * tiles_n)
    n = in_group // num_t * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (group * GROUP + in_group % num_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    part_depth = part_blocks * BLOCK_K
    part = tl.program_id(1)
    first = part * part_depth
    # Beyond the last row of the weight lies the last row again: read, and not stored. Rows of x are
    # left out: all programs read them, and more readers of one line would wait for each other.
    weights = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    xs = x + t.to(tl.int64)[None, :] * x_stride
    there = t[None, :] < num_rows
    last = tl.minimum(first + part_depth, K)
    if HELD:
        k = first + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            w = tl.load(weights + k[None, :])
        else:
            w = tl.load(weights + k[None, :], mask=k[None, :] < K, other=0.0)
        wait_for_inputs(PDL)
        row = tl.load(xs + k[:, None], mask=there & (k[:, None] < K), other=0.0)
        sums = tl.dot(w, row)
    else:
        if PDL:
            for kib in range(num_kib):
                lines = first + (kib * LINES + tl.arange(0, LINES)) * LINE
                _prefetch(weights + tl.minimum(lines, K - 1)[None, :])
        wait_for_inputs(PDL)
        if SPREAD or not IN_PARTS:
            sums = _sum_over_k(
                weights, xs, there, first, last, K, BLOCK_N, BLOCK_T, BLOCK_K, WHOLE_K
            )
        else:
            sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for part in range(num_parts):
                first = part * part_depth
                last = tl.minimum(first + part_depth, K)
                sums += _sum_over_k(
                    weights, xs, there, first, last, K, BLOCK_N, BLOCK_T, BLOCK_K, WHOLE_K
                )
    if SPREAD:
        tile_size: tl.constexpr = BLOCK_N * BLOCK_T
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        tile_sums = partials + tile.to(tl.int64) * tile_size + inside
        part_stride = tl.num_programs(0).to(tl.int64) * tile_size
        tl.store(tile_sums + part * part_stride, sums)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") < num_parts - 1:
            return
        tl.store(arrivals + tile, 0)
        sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for other in range(num_parts):
            # Not from the L1 cache, which does not see what other processors write.
            sums += tl.load(tile_sums + other * part_stride, cache_modifier=".cg")
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    places = out + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), mask=there & (n[:, None] < N))
