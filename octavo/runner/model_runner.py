"""Plan → tensors → model → sampled ids. Knows no HTTP, no text and no queues."""

import itertools
import threading

import torch

from octavo.core import SampledTokens, ScheduledTokens, StepPlan, StepResult
from octavo.layers import StepContext
from octavo.models import Model
from octavo.runner.inputs import prepare_inputs
from octavo.runner.kv_storage import KVStorage
from octavo.runner.rows import Row
from octavo.runner.sampler import Draw, sample


class ModelRunner:
    """The executor that runs a model. Sole writer of its rows and of the KV storage."""

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        block_size: int,
        device: str,
        num_threads: int | None = None,
    ):
        self._model = model
        self._storage = storage
        self._block_size = block_size
        self._device = device
        self._num_threads = num_threads
        self._thread: int | None = None  # the one that `num_threads` was last set for
        self._rows: dict[str, Row] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; the result has a token for each share that `samples`."""
        self._set_num_threads()
        self._update_rows(plan)
        failed, transfer_s = self._storage.transfer(plan.transfers)
        if not plan.scheduled:
            return StepResult(plan.step, (), failed, transfer_s)
        rows = [self._rows[share.sequence_id] for share in plan.scheduled]
        inputs = prepare_inputs(
            plan.scheduled, rows, block_size=self._block_size, device=self._device
        )
        context = StepContext(
            inputs.positions, inputs.slots, inputs.attention, self._storage.kv_caches
        )
        hidden = self._model(inputs.token_ids, context)
        for share, row in zip(plan.scheduled, rows, strict=True):
            row.num_computed_tokens += share.num_tokens
        if not inputs.sample_rows:
            return StepResult(plan.step, (), failed, transfer_s)
        draws = iter(sample(self._model.logits(hidden[inputs.sample_index]), inputs.sample_rows))
        sampled = tuple(
            _take(share, row, list(itertools.islice(draws, len(share.draft_ids) + 1)))
            for share, row in zip(plan.scheduled, rows, strict=True)
            if share.samples
        )
        return StepResult(plan.step, sampled, failed, transfer_s)

    def _set_num_threads(self) -> None:
        """OpenMP counts threads for each calling thread apart, and steps may come from another."""
        if self._num_threads is not None and self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            torch.set_num_threads(self._num_threads)

    def _update_rows(self, plan: StepPlan) -> None:
        """Apply the plan's difference to the rows."""
        for sequence_id in plan.dropped:
            self._rows.pop(sequence_id, None)
        for new in plan.new:
            self._rows[new.sequence_id] = Row(new)
        for share in plan.scheduled:
            table = self._rows[share.sequence_id].block_ids
            table[share.num_kept_blocks :] = share.new_block_ids


def _take(share: ScheduledTokens, row: Row, draws: list[Draw]) -> SampledTokens:
    """A row's new tokens: each draft that is what was drawn in its place, and the draw after them.

    Draws depend on seed and position only, so the text is the same as without drafts.
    """
    num_right = 0
    for draft_id, draw in zip(share.draft_ids, draws, strict=False):
        if draw.token_id != draft_id or not draw.is_finite:
            break
        num_right += 1
    taken = draws[: num_right + 1]
    # A failed row has no token; a step already planned may still run it on any id.
    row.token_ids += [max(draw.token_id, 0) for draw in taken]
    row.num_computed_tokens = len(row.token_ids) - 1
    if not all(draw.is_finite for draw in taken):
        error = "the model's output was not a finite number"
        return SampledTokens(share.sequence_id, (), error=error)
    logprobs = tuple(draw.logprobs for draw in taken if draw.logprobs is not None)
    return SampledTokens(
        share.sequence_id, tuple(draw.token_id for draw in taken), logprobs or None
    )
