"""A step's inputs in Triton: one program a sequence, and one for the tokens of nobody.

Owns the launch. Does not know requests.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.native.support import refuse
from octavo.kernels.prepare_inputs import DeviceRows, PreparedInputs, StepShares
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs

AT_ONCE = 512


def triton_prepare_inputs(
    shares: StepShares,
    rows: DeviceRows,
    out: PreparedInputs,
    *,
    block_size: int,
    padding_slot: int,
) -> None:
    """As PrepareInputs."""
    num_sequences, width = out.block_tables.shape
    if shares.rows.shape[0] != num_sequences or rows.block_tables.shape[1] < width:
        rule = "rows [B], and tables at least as wide as those that are filled"
        raise refuse("prepare_inputs", rule, rows=shares.rows, tables=rows.block_tables)
    launch(_prepare_inputs, (num_sequences + 1,))(
        *(shares.rows, shares.starts, shares.query_starts, shares.token_ids),
        *(rows.block_tables, rows.last_token_ids, rows.block_tables.stride(0)),
        *(out.token_ids, out.positions, out.slots, out.context_lens, out.block_tables, width),
        *(num_sequences, out.slots.shape[0], padding_slot),
        BLOCK_SIZE=block_size,
        AT_ONCE=AT_ONCE,
        num_warps=4,
        **launch_options(),
    )


@triton.jit(
    do_not_specialize=["table_width", "out_width", "num_sequences", "num_tokens", "padding_slot"],
    do_not_specialize_on_alignment=["given_ids", "out_ids", "out_positions", "out_slots"],
)
def _prepare_inputs(
    rows,
    starts,
    query_starts,
    given_ids,
    block_tables,
    last_token_ids,
    table_width,
    out_ids,
    out_positions,
    out_slots,
    out_lens,
    out_tables,
    out_width,
    num_sequences,
    num_tokens,
    padding_slot,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_inputs(PDL)
    b = tl.program_id(0)
    lane = tl.arange(0, AT_ONCE)
    first = tl.load(query_starts + b)
    if b == num_sequences:
        for begin in tl.range(first, num_tokens, AT_ONCE):
            token = begin + lane
            there = token < num_tokens
            tl.store(out_ids + token, tl.zeros([AT_ONCE], tl.int64), mask=there)
            tl.store(out_positions + token, tl.zeros([AT_ONCE], tl.int64), mask=there)
            slot = tl.zeros([AT_ONCE], tl.int64) + padding_slot
            tl.store(out_slots + token, slot, mask=there)
        return
    num_queries = tl.load(query_starts + b + 1) - first
    start = tl.load(starts + b)
    row = tl.load(rows + b).to(tl.int64)
    context_len = tl.where(num_queries > 0, start + num_queries, 0)
    tl.store(out_lens + b, context_len)
    table = block_tables + row * table_width
    own_table = out_tables + b.to(tl.int64) * out_width
    for begin in tl.range(0, tl.cdiv(context_len, BLOCK_SIZE), AT_ONCE):
        entry = begin + lane
        there = entry * BLOCK_SIZE < context_len
        tl.store(own_table + entry, tl.load(table + entry, mask=there, other=0), mask=there)
    drawn = tl.load(last_token_ids + row)
    for begin in tl.range(0, num_queries, AT_ONCE):
        index = begin + lane
        there = index < num_queries
        given = tl.load(given_ids + first + index, mask=there, other=0).to(tl.int64)
        position = start + index
        block = tl.load(table + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        tl.store(out_ids + first + index, tl.where(given < 0, drawn, given), mask=there)
        tl.store(out_positions + first + index, position.to(tl.int64), mask=there)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(out_slots + first + index, slot, mask=there)
