"""What a device does in a step: from packet to hidden states, and from those to drawn ids.

Every stage only reads and writes memory of the device, so a CUDA graph can hold it. Knows neither
plans nor requests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels import (
    PREPARE_INPUTS,
    RECORD_DRAWS,
    SAMPLE_TOKENS,
    AttentionBatch,
    Case,
    DeviceRows,
    PreparedInputs,
    StepShares,
)
from octavo.layers import StepContext, StepImages
from octavo.models import Model
from octavo.runner.packet import Draws, StepSizes


@dataclass(frozen=True, slots=True)
class StepBounds:
    """The most tokens that one sequence of a step runs, and the longest context after it."""

    max_query_len: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The prepared inputs of a step: for each KV group slots and block tables, the rest shared."""

    groups: tuple[PreparedInputs, ...]

    def first(self, num_seqs: int, num_tokens: int) -> "StepInputs":
        """Of so many sequences and tokens only."""
        return StepInputs(
            tuple(
                PreparedInputs(
                    inputs.token_ids[:num_tokens],
                    inputs.positions[:num_tokens],
                    inputs.slots[:num_tokens],
                    inputs.context_lens[:num_seqs],
                    inputs.block_tables[:num_seqs],
                )
                for inputs in self.groups
            )
        )


class Stages:
    """The model between the device's rows and the ids that are drawn."""

    def __init__(
        self,
        model: Model,
        kv_caches: list[Tensor],
        rows: tuple[DeviceRows, ...],
        *,
        block_size: int,
        padding_slot: int,
    ):
        self._model = model
        self._kv_caches = kv_caches
        self._rows = rows
        self._block_size = block_size
        self._padding_slot = padding_slot
        self.device = rows[0].last_token_ids.device
        case = Case(self.device.type, torch.float32)
        self._prepare = PREPARE_INPUTS.select(case).function
        self._draw = SAMPLE_TOKENS.select(case).function
        self._record = RECORD_DRAWS.select(case).function

    def allocate_inputs(self, sizes: StepSizes, max_context_len: int) -> StepInputs:
        """Memory for the inputs of a step, uninitialised."""
        num_groups, num_seqs = len(self._rows), sizes.num_seqs
        longs = torch.empty(
            (2 + num_groups, sizes.num_tokens), dtype=torch.int64, device=self.device
        )
        token_ids, positions, *slots = longs.unbind()
        width = -(-max_context_len // self._block_size)
        context_lens = torch.empty(num_seqs, dtype=torch.int32, device=self.device)
        return StepInputs(
            tuple(
                PreparedInputs(
                    token_ids,
                    positions,
                    own_slots,
                    context_lens,
                    torch.empty((num_seqs, width), dtype=torch.int32, device=self.device),
                )
                for own_slots in slots
            )
        )

    def run_model(
        self,
        shares: StepShares,
        draws: Draws,
        inputs: StepInputs,
        bounds: StepBounds,
        *,
        images: StepImages | None = None,
    ) -> Tensor:
        """One pass over the step's tokens -> the hidden states of `draws.index`, in its order."""
        attentions = []
        for rows, own in zip(self._rows, inputs.groups, strict=True):
            self._prepare(
                shares,
                rows,
                own,
                block_size=self._block_size,
                padding_slot=self._padding_slot,
            )
            attention = AttentionBatch(
                query_starts=shares.query_starts,
                context_lens=own.context_lens,
                block_tables=own.block_tables,
                max_query_len=bounds.max_query_len,
                max_context_len=bounds.max_context_len,
            )
            attentions.append((own.slots, attention))
        (slots, attention), *others = attentions
        first = inputs.groups[0]
        draws_from_all = bounds.max_query_len == 1 and len(draws.rows) == len(draws.index) == len(
            first.token_ids
        )
        context = StepContext(
            first.positions,
            slots,
            attention,
            self._kv_caches,
            wanted=None if draws_from_all else draws.index,
            images=images,
            other_groups=tuple(others),
        )
        hidden: Tensor = self._model(first.token_ids, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size] in the model's dtype."""
        return self._model.logits(hidden)

    def draw(self, logits: Tensor, draws: Draws, *, truncates: bool) -> Tensor:
        """Draw from logits [S, vocab_size] -> ids [S] int64, negative where there is none.

        Each row's last id on the device becomes the one drawn. What is there instead of an id is
        NOT_FINITE or NO_SUCH_ID.
        """
        options = draws.truncating if truncates else draws.plain
        token_ids, is_finite = self._draw(logits, options)
        self._record(
            token_ids,
            is_finite,
            draws.rows,
            self._rows[0].last_token_ids,
            vocab_size=logits.shape[1],
        )
        return token_ids
