"""What is kept of each sequence between steps, on the host and on the device.

Sole writer: the model runner.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.config import ResolvedConfig
from octavo.config.planned_steps import num_scored_at_once
from octavo.core import Grammars, Matcher, NewSequence, StepPlan
from octavo.errors import IntegrityError
from octavo.kernels import DeviceRows, DrawOptions
from octavo.runner.reads import Reader, create_reader

INT32_MAX = 2**31 - 1

# Places in the flattened block tables, and the ids of the blocks that belong there.
NewBlocks = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that one step, and one sequence, can ask of a runner.

    num_scored_at_once: prompt tokens whose logits are held at the same time.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_scored_at_once: int = 64
    num_groups: int = 1  # of layers, each with block tables of its own

    @property
    def max_num_blocks(self) -> int:
        """Entries of a block table: the blocks of the longest sequence.

        Of several tables each begins at a multiple of 16 bytes, as kernels want it.
        """
        num_blocks = -(-self.max_model_len // self.block_size)
        return num_blocks if self.num_groups == 1 else -(-num_blocks // 4) * 4


def step_limits(config: ResolvedConfig) -> StepLimits:
    """Those of an engine."""
    return StepLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_scored_at_once=num_scored_at_once(config),
        num_groups=config.kv_groups.num_groups,
    )


class Row:
    """One sequence: its ids as far as they were read, and its sampling options."""

    __slots__ = (
        "adapter",
        "banned",
        "grid_positions",
        "images",
        "index",
        "matcher",
        "min_num_tokens",
        "num_computed_tokens",
        "num_logprobs",
        "num_matched_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "sampling",
        "seed",
        "shapes_logits",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, new: NewSequence, index: int = 0, matcher: Matcher | None = None):
        sampling = new.sampling
        self.matcher = matcher  # of the answer's shape, where it must have one
        self.num_matched_tokens = new.num_prompt_tokens  # those that the matcher need not see again
        self.index = index  # into the tables of the device
        self.token_ids = list(new.token_ids)
        self.num_tokens = len(self.token_ids)  # with those that were drawn but not read yet
        self.num_prompt_tokens = new.num_prompt_tokens
        self.num_computed_tokens = new.num_computed_tokens
        self.sampling = sampling
        self.seed = new.seed
        self.stop_ids = new.stop_ids
        self.banned = new.banned
        self.images = new.images
        self.adapter = new.adapter
        # Of the prompt, and what is added to those after it; made where a model turns by them.
        self.grid_positions: tuple[npt.NDArray[np.int64], int] | None = None
        self.num_logprobs = new.num_logprobs
        self.min_num_tokens = new.num_prompt_tokens + sampling.min_tokens
        self.shapes_logits = (
            sampling.has_penalties
            or bool(sampling.logit_bias)
            or sampling.allowed_token_ids is not None
            or matcher is not None
            or bool(new.banned)
        )

    @property
    def wants_more_than_a_draw(self) -> bool:
        """True where its logits are changed before the draw, or reported after it."""
        return (
            self.shapes_logits
            or self.num_logprobs is not None
            or self.num_tokens < self.min_num_tokens
        )

    def with_tokens(self, token_ids: Sequence[int]) -> "Row":
        """The same sequence as if these were its next tokens."""
        row = copy.copy(self)
        row.matcher = None if self.matcher is None else self.matcher.copy()
        row.token_ids = [*self.token_ids, *token_ids]
        row.num_tokens = len(row.token_ids)
        return row


class OptionColumns:
    """How each row wants its tokens drawn, a column for each option, so that a step only gathers.

    The last row is nobody's: greedy, which costs least.
    """

    def __init__(self, num_rows: int):
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seeds = np.zeros(num_rows, np.int64)
        self.truncates = np.zeros(num_rows, np.bool_)

    def set(self, index: int, row: Row) -> None:
        """Note a new row."""
        options, greedy = row.sampling, row.sampling.greedy
        self.temperature[index] = 0.0 if greedy else options.temperature
        self.top_k[index] = min(max(options.top_k, 0), INT32_MAX)
        self.top_p[index] = options.top_p
        self.min_p[index] = options.min_p
        self.seeds[index] = row.seed
        shortened = options.top_k > 0 or options.top_p < 1.0 or options.min_p > 0.0
        self.truncates[index] = shortened and not greedy

    def gather(self, indices: npt.NDArray[np.int32], options: DrawOptions) -> None:
        """Fill in the options of these rows [S]."""
        for column, section in (
            (self.temperature, options.temperature),
            (self.top_k, options.top_k),
            (self.top_p, options.top_p),
            (self.min_p, options.min_p),
            (self.seeds, options.seeds),
        ):
            np.take(column, indices, out=section.numpy())


class Rows:
    """The rows of all sequences that the scheduler has introduced and not dropped.

    On the device a row is a line of the block tables and the id that was drawn last. One line more
    than there can be sequences belongs to nobody: what fills a batch up points there.
    """

    def __init__(self, limits: StepLimits, device: str, grammars: Grammars | None = None):
        self._limits = limits
        self._grammars = grammars
        self._rows: dict[str, Row] = {}
        self.readers: dict[str, Reader] = {}  # of those rows whose hidden states are read
        self._free = list(range(limits.max_num_seqs - 1, -1, -1))
        self.nobody = limits.max_num_seqs
        self.options = OptionColumns(limits.max_num_seqs + 1)
        num_rows, width = limits.max_num_seqs + 1, limits.max_num_blocks
        self._tables = torch.zeros(
            (num_rows, limits.num_groups * width), dtype=torch.int32, device=device
        )
        last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # Of each group: a row has its tables one after the other, but what was drawn last once.
        self.on_device = tuple(
            DeviceRows(table, last_token_ids) for table in torch.split(self._tables, width, 1)
        )

    def __getitem__(self, sequence_id: str) -> Row:
        return self._rows[sequence_id]

    def update(self, plan: StepPlan) -> NewBlocks:
        """Apply the plan's difference; return what must change on the device."""
        for sequence_id in plan.dropped:
            self._forget(sequence_id)
        places: list[int] = []
        block_ids: list[int] = []
        for new in plan.new:
            self._forget(new.sequence_id)
            self._write(self._add(new), 0, new.block_ids, places, block_ids)
        for share in plan.scheduled:
            if share.new_block_ids:
                row = self._rows[share.sequence_id]
                self._write(row, share.num_kept_blocks, share.new_block_ids, places, block_ids)
        return places, block_ids

    def apply(self, places: Tensor, block_ids: Tensor) -> None:
        """Write what `update` returned, now on the device, to the tables there."""
        self._tables.view(-1).index_put_((places.long(),), block_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._tables.nbytes + self.on_device[0].last_token_ids.nbytes

    def _add(self, new: NewSequence) -> Row:
        if not self._free:
            raise IntegrityError(
                f"more than {self._limits.max_num_seqs} sequences are with the runner"
            )
        shape, matcher = new.sampling.structured_outputs, None
        if shape is not None:
            if self._grammars is None:
                raise IntegrityError("an answer must have a shape, and nobody here knows grammars")
            matcher = self._grammars.matcher(shape)
        row = Row(new, self._free.pop(), matcher)
        self._rows[new.sequence_id] = row
        if (reader := create_reader(new)) is not None:
            self.readers[new.sequence_id] = reader
        self.options.set(row.index, row)
        return row

    def _forget(self, sequence_id: str) -> None:
        row = self._rows.pop(sequence_id, None)
        if row is not None:
            self._free.append(row.index)
            self.readers.pop(sequence_id, None)

    def _write(
        self,
        row: Row,
        first: int,
        block_ids: Sequence[int],
        places: list[int],
        values: list[int],
    ) -> None:
        # The plan has the tables of all groups in one, entry by entry: see `KVGroups`. A run of
        # blocks may be longer than any context: what lies beyond is never read.
        num_groups, room = self._limits.num_groups, self._limits.max_num_blocks
        for group in range(num_groups):
            own = block_ids[(group - first) % num_groups :: num_groups]
            index = -((group - first) // num_groups)
            start = (row.index * num_groups + group) * room
            places += range(start + index, start + min(index + len(own), room))
            values += own[: max(0, room - index)]
