"""After a draw: the device remembers each row's id, and the host will see which were none.

A draw cannot leave the vocabulary, unless a kernel is wrong. Then that id would be looked up in the
embeddings by the next step, which ends the whole process on a GPU: so ids are bounded here, where
they are kept, whichever kernel drew them.


Owns the op. Does not know how ids were drawn.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.kernels.dispatch import Op, needs_cpu
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

# In place of a drawn id:
NOT_FINITE = -1  # the logits were no numbers
NO_SUCH_ID = -2  # it was none of the vocabulary


class RecordDraws(Protocol):
    def __call__(
        self,
        token_ids: Tensor,
        is_finite: Tensor,
        rows: Tensor,
        last_token_ids: Tensor,
        *,
        vocab_size: int,
    ) -> None:
        """last_token_ids[rows] = token_ids; then NOT_FINITE for token_ids where not is_finite.

        token_ids [S] int64, is_finite [S] bool, rows [S] int32, last_token_ids [R] int64; the first
        and the last are written. A failed row remembers the id all the same, for a step that is
        planned already may still run it. Of rows that come twice either id is remembered.
        Outside of 0 to vocab_size - 1, id 0 is remembered, and token_ids has NO_SUCH_ID.
        """
        ...


def reference_record_draws(
    token_ids: Tensor,
    is_finite: Tensor,
    rows: Tensor,
    last_token_ids: Tensor,
    *,
    vocab_size: int,
) -> None:
    is_known = (token_ids >= 0) & (token_ids < vocab_size)
    last_token_ids[rows.long()] = token_ids.where(is_known, 0)
    token_ids.masked_fill_(~is_known, NO_SUCH_ID).masked_fill_(~is_finite, NOT_FINITE)


def numpy_record_draws(
    token_ids: Tensor,
    is_finite: Tensor,
    rows: Tensor,
    last_token_ids: Tensor,
    *,
    vocab_size: int,
) -> None:
    """As RecordDraws, on the host: for a few numbers torch's calls cost more than they do."""
    ids, remembered = token_ids.numpy(), last_token_ids.numpy()
    remembered[rows.numpy()] = ids
    is_unknown = ids.view("uint64") >= vocab_size  # negative ones are the largest of all
    if is_unknown.any():
        remembered[rows.numpy()[is_unknown]] = 0
        ids[is_unknown] = NO_SUCH_ID
    ids[~is_finite.numpy()] = NOT_FINITE


RECORD_DRAWS: Op[RecordDraws] = Op("record_draws", reference_record_draws)
RECORD_DRAWS.register("numpy", numpy_record_draws, needs_cpu)
RECORD_DRAWS.register_module(
    "triton", "octavo.kernels.triton_record_draws:triton_record_draws", unsupported_by_triton
)
