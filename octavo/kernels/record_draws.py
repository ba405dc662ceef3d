"""After a draw: the device remembers each row's id, and the host will see which were none.

Owns the op. Does not know how ids were drawn.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.kernels.dispatch import Op, needs_cpu
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

NOT_FINITE = -1  # in place of a drawn id, where the logits were no numbers


class RecordDraws(Protocol):
    def __call__(
        self, token_ids: Tensor, is_finite: Tensor, rows: Tensor, last_token_ids: Tensor
    ) -> None:
        """last_token_ids[rows] = token_ids; then token_ids where not is_finite = NOT_FINITE.

        token_ids [S] int64, is_finite [S] bool, rows [S] int32, last_token_ids [R] int64; the first
        and the last are written. A failed row remembers the id all the same, for a step that is
        planned already may still run it. Of rows that come twice either id is remembered.
        """
        ...


def reference_record_draws(
    token_ids: Tensor, is_finite: Tensor, rows: Tensor, last_token_ids: Tensor
) -> None:
    last_token_ids[rows.long()] = token_ids
    token_ids.masked_fill_(~is_finite, NOT_FINITE)


def numpy_record_draws(
    token_ids: Tensor, is_finite: Tensor, rows: Tensor, last_token_ids: Tensor
) -> None:
    """As RecordDraws, on the host: for a few numbers torch's calls cost more than they do."""
    ids = token_ids.numpy()
    last_token_ids.numpy()[rows.numpy()] = ids
    ids[~is_finite.numpy()] = NOT_FINITE


RECORD_DRAWS: Op[RecordDraws] = Op("record_draws", reference_record_draws)
RECORD_DRAWS.register("numpy", numpy_record_draws, needs_cpu)
RECORD_DRAWS.register_module(
    "triton", "octavo.kernels.triton_record_draws:triton_record_draws", unsupported_by_triton
)
