"""The bookkeeping of a draw in Triton: one small kernel in place of torch's four.

Owns the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.native.support import refuse
from octavo.kernels.record_draws import NO_SUCH_ID, NOT_FINITE
from octavo.kernels.triton_launch import allow_next, launch, launch_options, wait_for_inputs

AT_ONCE = 128


def triton_record_draws(
    token_ids: Tensor,
    is_finite: Tensor,
    rows: Tensor,
    last_token_ids: Tensor,
    *,
    vocab_size: int,
) -> None:
    """As RecordDraws."""
    (num_draws,) = token_ids.shape
    if is_finite.shape != (num_draws,) or rows.shape != (num_draws,):
        raise refuse("record_draws", "all are [S]", token_ids=token_ids, rows=rows)
    if num_draws:
        launch(_record_draws, (triton.cdiv(num_draws, AT_ONCE),))(
            token_ids,
            is_finite,
            rows,
            last_token_ids,
            num_draws,
            vocab_size,
            NOT_FINITE=NOT_FINITE,
            NO_SUCH_ID=NO_SUCH_ID,
            AT_ONCE=AT_ONCE,
            num_warps=4,
            **launch_options(),
        )


@triton.jit(
    do_not_specialize=["num_draws", "vocab_size"],
    do_not_specialize_on_alignment=["token_ids", "is_finite", "rows"],
)
def _record_draws(
    token_ids,
    is_finite,
    rows,
    last_token_ids,
    num_draws,
    vocab_size,
    NOT_FINITE: tl.constexpr,
    NO_SUCH_ID: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_inputs(PDL)
    index = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    there = index < num_draws
    token = tl.load(token_ids + index, mask=there, other=0)
    row = tl.load(rows + index, mask=there, other=0)
    finite = tl.load(is_finite + index, mask=there, other=0)
    known = (token >= 0) & (token < vocab_size)
    tl.store(last_token_ids + row, tl.where(known, token, 0), mask=there)
    seen = tl.where(finite != 0, tl.where(known, token, NO_SUCH_ID), NOT_FINITE)
    tl.store(token_ids + index, seen, mask=there)
