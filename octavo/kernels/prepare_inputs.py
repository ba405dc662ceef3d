"""A step's inputs from the rows that stay on the device: ids, positions, slots, lengths, blocks.

Owns the arithmetic from "sequence b runs tokens starts[b] and on" to one entry a token. Does not
know requests, nor how rows came to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.dispatch import Op, needs_cpu
from octavo.kernels.native.support import refuse
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

KNOWN_TO_THE_DEVICE = -1  # a token id that only the device knows: the row's last one


@dataclass(frozen=True, slots=True)
class StepShares:
    """What B sequences compute in a step of at most T tokens. int32, contiguous.

    Sequences that only fill a batch up come last and own no tokens; tokens beyond those of the last
    sequence belong to nobody.
    """

    rows: Tensor  # [B]: which row of the device's tables a sequence is
    starts: Tensor  # [B]: tokens that are in the cache already
    query_starts: Tensor  # [B+1]: sequence b owns tokens query_starts[b]:query_starts[b+1]
    token_ids: Tensor  # [T]: KNOWN_TO_THE_DEVICE for an id that was drawn but not read yet


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """What the device keeps of R sequences from step to step."""

    block_tables: Tensor  # [R, W] int32; its lines may be part of longer ones
    last_token_ids: Tensor  # [R] int64: what was drawn last


@dataclass(frozen=True, slots=True)
class PreparedInputs:
    """Where the result goes: every element of it is written."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block id * block_size + offset
    context_lens: Tensor  # [B] int32: tokens in the cache after the step; 0 for a filler
    block_tables: Tensor  # [B, W] int32: entries beyond a sequence's context are left as they were

    def __post_init__(self) -> None:
        tokens = (self.token_ids, self.positions, self.slots)
        if (
            any(t.dtype is not torch.int64 or t.shape != self.slots.shape for t in tokens)
            or self.context_lens.dtype is not torch.int32
            or self.block_tables.dtype is not torch.int32
            or self.block_tables.shape[0] != self.context_lens.shape[0]
        ):
            rule = "ids, positions and slots are [T] int64, lengths [B] and tables [B, W] int32"
            raise refuse("prepare_inputs", rule, slots=self.slots, tables=self.block_tables)


class PrepareInputs(Protocol):
    def __call__(
        self,
        shares: StepShares,
        rows: DeviceRows,
        out: PreparedInputs,
        *,
        block_size: int,
        padding_slot: int,
    ) -> None:
        """Fill `out`. Tokens of nobody get id 0, position 0 and `padding_slot`."""
        ...


def reference_prepare_inputs(
    shares: StepShares,
    rows: DeviceRows,
    out: PreparedInputs,
    *,
    block_size: int,
    padding_slot: int,
) -> None:
    query_starts = shares.query_starts.long()
    lengths = query_starts.diff()
    num_tokens = int(query_starts[-1])
    own = torch.repeat_interleave(lengths)  # [tokens of somebody]: the sequence of each
    row = shares.rows.long()
    token = torch.arange(num_tokens, device=own.device)
    position = token - query_starts[own] + shares.starts[own]
    block = rows.block_tables[row[own], position // block_size]
    given = shares.token_ids[:num_tokens].long()
    out.token_ids[:num_tokens] = torch.where(given < 0, rows.last_token_ids[row[own]], given)
    out.positions[:num_tokens] = position
    out.slots[:num_tokens] = block * block_size + position % block_size
    out.token_ids[num_tokens:] = 0
    out.positions[num_tokens:] = 0
    out.slots[num_tokens:] = padding_slot
    out.context_lens.copy_(torch.where(lengths > 0, shares.starts + lengths, 0))
    out.block_tables.copy_(rows.block_tables[row, : out.block_tables.shape[1]])


def numpy_prepare_inputs(
    shares: StepShares,
    rows: DeviceRows,
    out: PreparedInputs,
    *,
    block_size: int,
    padding_slot: int,
) -> None:
    """As PrepareInputs, on the host: for a few numbers torch's calls cost more than they do."""
    query_starts, row = shares.query_starts.numpy(), shares.rows.numpy()
    tables, starts = rows.block_tables.numpy(), shares.starts.numpy()
    lengths = np.diff(query_starts)
    num_tokens = int(query_starts[-1])
    # What a token's index in the step lacks to its position, and its row: both by its sequence.
    position = np.repeat(starts - query_starts[:-1], lengths)
    position += np.arange(num_tokens, dtype=np.int32)
    own_row = np.repeat(row, lengths)
    given = shares.token_ids.numpy()[:num_tokens]
    token_ids, slots = out.token_ids.numpy(), out.slots.numpy()
    np.copyto(token_ids[:num_tokens], given)
    if given.size and given.min() < 0:
        unread = given < 0
        token_ids[:num_tokens][unread] = rows.last_token_ids.numpy()[own_row[unread]]
    out.positions.numpy()[:num_tokens] = position
    block, offset = np.divmod(position, block_size)
    slots[:num_tokens] = tables[own_row, block].astype(np.int64) * block_size + offset
    token_ids[num_tokens:] = 0
    out.positions.numpy()[num_tokens:] = 0
    slots[num_tokens:] = padding_slot
    out.context_lens.numpy()[:] = np.where(lengths > 0, starts + lengths, 0)
    out.block_tables.numpy()[:] = tables[row, : out.block_tables.shape[1]]


PREPARE_INPUTS: Op[PrepareInputs] = Op("prepare_inputs", reference_prepare_inputs)
PREPARE_INPUTS.register("numpy", numpy_prepare_inputs, needs_cpu)
PREPARE_INPUTS.register_module(
    "triton", "octavo.kernels.triton_prepare_inputs:triton_prepare_inputs", unsupported_by_triton
)
