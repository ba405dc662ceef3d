"""silu(x Wgᵀ) * (x Wuᵀ) for many rows with Hopper's own instructions, in Gluon.

A product as cuBLAS makes it: one warp copies tiles of x and of the weight to shared memory by TMA,
as far ahead as there is room; two warpgroups of 64 rows each multiply them by wgmma. But the 256
outputs of a tile are 128 gates and the 128 ups that belong to them. So what is stored is a quarter
of what two kernels would move: [T, 2I] is neither written nor read.

Programs stay for many tiles, so that the copies for the next one begin before this one ends, and a
warpgroup that is ahead stores while the other multiplies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.gated_activations import GatedActivation
from octavo.kernels.gated_linear import is_worth_one_kernel
from octavo.kernels.triton_attention_tile import multiprocessors
from octavo.kernels.triton_launch import launch, launch_options
from octavo.kernels.triton_support import refuse

CONSUMERS = gl.constexpr(2)  # warpgroups that multiply
CONSUMER_ROWS = gl.constexpr(64)  # what one wgmma holds
TILE_ROWS = gl.constexpr(128)
TILE_OUTPUTS = gl.constexpr(128)  # and as many gates and ups, the 256 columns of one wgmma
STEP = gl.constexpr(64)  # inputs: rows of 128 bytes, swizzled as wgmma reads them
STAGES = 4  # steps in shared memory at once
GROUP = 16  # tiles of rows beside which a tile of the weight is used again, in the L2 cache
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def hopper_gated_linear(
    x: Tensor,
    weight: Tensor | None,
    multiply: Callable[[Tensor], Tensor],
    activate: GatedActivation,
) -> Tensor:
    """As GatedLinear, for 16-bit values. Sums are fp32, rounded once."""
    if weight is None or not is_worth_one_kernel(x.shape[0], weight.shape[0] // 2):
        return activate(multiply(x))
    num_rows, depth = x.shape
    double, weight_depth = weight.shape
    if weight_depth != depth or weight.dtype is not x.dtype or double % 2:
        rule = f"weight is [2I, {depth}] {x.dtype}"
        raise refuse("gated_linear", rule, weight=weight)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        raise refuse("gated_linear", "x is [T, K] with rows of whole 16 bytes", x=x)
    out = x.new_empty(num_rows, double // 2)
    row_tiles = -(-num_rows // TILE_ROWS.value)
    tiles = row_tiles * -(-out.shape[1] // TILE_OUTPUTS.value)
    launch(_gated_linear, (min(tiles, multiprocessors(x)),))(
        TensorDescriptor(
            x, list(x.shape), list(x.stride()), [CONSUMER_ROWS.value, STEP.value], TILE_LAYOUT
        ),
        TensorDescriptor.from_tensor(weight, [TILE_OUTPUTS.value, STEP.value], TILE_LAYOUT),
        TensorDescriptor.from_tensor(out, [CONSUMER_ROWS.value, TILE_OUTPUTS.value], TILE_LAYOUT),
        num_rows,
        out.shape[1],
        depth,
        STAGES=STAGES,
        GROUP=GROUP,
        num_warps=4,
        num_stages=1,
        **launch_options(),
    )
    return out


@gluon.jit(do_not_specialize=["num_rows"])
def _gated_linear(
    x,
    weight,
    out,
    num_rows,
    num_outputs,
    depth,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PDL: gl.constexpr,
):
    """Makes the ring of tiles, then parts the warps by what they do.

    `x` [T, K], `weight` [2I, K] and `out` [T, I] are TMA descriptors. A stage of the ring is one
    step: 64 rows of x for each consumer, and the gates and ups for both. Its barriers: `filled`,
    completed by the bytes that the copying warp announced, and `free`, by one arrival of each
    consumer. A consumer gives a stage back when it has begun the next step.
    """
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = x.dtype
    x_shape: gl.constexpr = [STAGES * CONSUMERS, CONSUMER_ROWS, STEP]
    xs = gl.allocate_shared_memory(dtype, x_shape, x.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_OUTPUTS, STEP], weight.layout)
    out_shape: gl.constexpr = [CONSUMERS, CONSUMER_ROWS, TILE_OUTPUTS]
    outs = gl.allocate_shared_memory(dtype, out_shape, out.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    fence_async_shared()
    if PDL:
        gdc_wait()
    ring = (xs, weights, filled, free)
    sizes = (num_rows, num_outputs, depth)
    gl.warp_specialize(
        [
            (_multiply, (out, outs, ring, sizes, 0, GROUP)),
            (_multiply, (out, outs, ring, sizes, 1, GROUP)),
            (_copy, (x, weight, ring, sizes, GROUP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _num_tiles(sizes):
    return gl.cdiv(sizes[0], TILE_ROWS) * gl.cdiv(sizes[1], TILE_OUTPUTS)


@gluon.jit
def _place_of(tile, sizes, GROUP: gl.constexpr):
    """The first row and the first output of a tile: down GROUP tiles of rows, then to the right."""
    row_tiles = gl.cdiv(sizes[0], TILE_ROWS)
    group_tiles = GROUP * gl.cdiv(sizes[1], TILE_OUTPUTS)
    group = tile // group_tiles
    height = gl.minimum(row_tiles - group * GROUP, GROUP)
    inside = tile - group * group_tiles
    return (group * GROUP + inside % height) * TILE_ROWS, inside // height * TILE_OUTPUTS


@gluon.jit
def _copy(x, weight, ring, sizes, GROUP: gl.constexpr):
    """The copying warp. Beyond the last row and the last input there are zeros."""
    xs, weights, filled, free = ring
    stages: gl.constexpr = weights.shape[0]
    stage_bytes: gl.constexpr = x.block_type.nbytes * CONSUMERS + weight.block_type.nbytes * 2
    stage = 0
    phase = 1  # of `free`: the first time nobody has to give a stage back
    for tile in range(gl.program_id(0), _num_tiles(sizes), gl.num_programs(0)):
        row, output = _place_of(tile, sizes, GROUP)
        for k in range(0, sizes[2], STEP):
            barrier = filled.index(stage)
            both = weights.index(stage)
            gates = both.slice(0, TILE_OUTPUTS, 0)
            ups = both.slice(TILE_OUTPUTS, TILE_OUTPUTS, 0)
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(barrier, stage_bytes)
            tma.async_copy_global_to_shared(weight, [output, k], barrier, gates)
            for i in gl.static_range(CONSUMERS):
                place = xs.index(stage * CONSUMERS + i)
                tma.async_copy_global_to_shared(x, [row + i * CONSUMER_ROWS, k], barrier, place)
            tma.async_copy_global_to_shared(weight, [sizes[1] + output, k], barrier, ups)
            stage += 1
            phase = gl.where(stage == stages, phase ^ 1, phase)
            stage = gl.where(stage == stages, 0, stage)


@gluon.jit
def _multiply(out, outs, ring, sizes, WHICH: gl.constexpr, GROUP: gl.constexpr):
    """One warpgroup: rows WHICH * 64 to WHICH * 64 + 63 of each tile. What is beyond, TMA drops."""
    xs, weights, filled, free = ring
    stages: gl.constexpr = weights.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * TILE_OUTPUTS, 16])
    staging = outs.index(WHICH)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), _num_tiles(sizes), gl.num_programs(0)):
        row, output = _place_of(tile, sizes, GROUP)
        acc = gl.zeros([CONSUMER_ROWS, 2 * TILE_OUTPUTS], gl.float32, layout)
        before = 0
        for k in range(0, sizes[2], STEP):
            mbarrier.wait(filled.index(stage), phase)
            x_tile = xs.index(stage * CONSUMERS + WHICH)
            weight_tile = weights.index(stage).permute((1, 0))
            pending = warpgroup_mma(x_tile, weight_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[pending])
            # The products of the step before are done, and it can give its stage back.
            mbarrier.arrive(free.index(before), count=1, pred=k > 0)
            before = stage
            stage += 1
            phase = gl.where(stage == stages, phase ^ 1, phase)
            stage = gl.where(stage == stages, 0, stage)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(before), count=1)
        halves = acc.reshape([CONSUMER_ROWS, 2, TILE_OUTPUTS]).permute((0, 2, 1))
        gate, up = halves.split()
        gated = gate / (1.0 + gl.exp(-gate)) * up
        tma.store_wait(0)  # the tile before has left
        staging.store(gated.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row + WHICH * CONSUMER_ROWS, output], staging)
    tma.store_wait(0)
