"""Plan → tensors → model → sampled ids. Knows no HTTP, no text and no queues."""

import threading

import torch
from torch import Tensor

from octavo.core import StepPlan, StepResult
from octavo.layers import KVSpec, StepContext
from octavo.models import Model
from octavo.runner.inputs import prepare_inputs
from octavo.runner.rows import Row
from octavo.runner.sampler import sample


def allocate_kv_caches(
    specs: list[KVSpec], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """The KV storage of each layer, [2, num_blocks, Hkv, block_size, D], uninitialised.

    On a CPU the system backs a page when it is first written, so unused blocks cost no memory.
    """
    return [
        torch.empty(
            (2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim),
            dtype=dtype,
            device=device,
        )
        for spec in specs
    ]


class ModelRunner:
    """The executor that runs a model. Sole writer of its rows and of the KV storage."""

    def __init__(
        self,
        model: Model,
        kv_caches: list[Tensor],
        *,
        block_size: int,
        device: str,
        num_threads: int | None = None,
    ):
        self._model = model
        self._kv_caches = kv_caches
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
        if not plan.scheduled:
            return StepResult(plan.step, ())
        rows = [self._rows[share.sequence_id] for share in plan.scheduled]
        inputs = prepare_inputs(
            plan.scheduled, rows, block_size=self._block_size, device=self._device
        )
        context = StepContext(inputs.positions, inputs.slots, inputs.attention, self._kv_caches)
        hidden = self._model(inputs.token_ids, context)
        for share, row in zip(plan.scheduled, rows, strict=True):
            row.num_computed_tokens += share.num_tokens
        if not inputs.sample_rows:
            return StepResult(plan.step, ())
        logits = self._model.logits(hidden[inputs.sample_index])
        sampled = sample(logits, inputs.sample_rows)
        for row, token in zip(inputs.sample_rows, sampled, strict=True):
            # A failed row has no token; a step already planned may still run it on any id.
            row.token_ids.append(max(token.token_id, 0))
        return StepResult(plan.step, tuple(sampled))

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
            self._rows[share.sequence_id].block_ids.extend(share.new_block_ids)
