"""Plan → tensors → model → sampled ids. Knows no HTTP, no text and no queues."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from msgspec import structs
from torch import Tensor

from octavo.config.memory_plan import NEW_BLOCKS_WORDS
from octavo.core import (
    FailureCode,
    Grammars,
    Reading,
    SampledTokens,
    ScheduledTokens,
    StepPlan,
    StepResult,
)
from octavo.kernels import NO_SUCH_ID
from octavo.models import Model
from octavo.runner.adapters import create_token_adapters
from octavo.runner.graphs import Recorder, StepGraphs, cuda_recorder
from octavo.runner.images import ImageStore
from octavo.runner.kv_storage import KVStorage
from octavo.runner.lack_of_memory import memory_errors
from octavo.runner.layout import StepLayout, lay_out
from octavo.runner.links import Readback, Uplink
from octavo.runner.packet import Packet, Packets, StepSizes
from octavo.runner.positions import create_token_positions
from octavo.runner.reads import NOT_FINITE, lay_out_reads, read
from octavo.runner.rows import NewBlocks, Row, Rows, StepLimits
from octavo.runner.sampler import Drawn, sample
from octavo.runner.stages import Stages, StepBounds

_NO_SUCH_ID = "a token was drawn that is not in the vocabulary"


class ModelRunner:
    """The executor that runs a model. Sole writer of its rows and of the KV storage.

    `launch` hands a step to the device and returns; the step before may still be running, for what
    it draws stays on the device. `execute` waits for the result.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        limits: StepLimits,
        *,
        device: str,
        num_threads: int | None = None,
        grammars: Grammars | None = None,
        images: ImageStore | None = None,
    ):
        self._storage = storage
        self._limits = limits
        self._num_threads = num_threads
        self._thread: int | None = None  # the one that `num_threads` was last set for
        self._images = images  # None: the model sees none
        # What a model of this kind is told of each token, beside what the packet has.
        told = create_token_adapters(model, device), create_token_positions(model, limits, device)
        self._told = tuple(one for one in told if one is not None)
        self._rows = Rows(limits, device, grammars)
        self._stages = Stages(
            model,
            storage.of_layers,
            self._rows.on_device,
            block_size=limits.block_size,
            padding_slot=storage.padding_slot,
        )
        # With drafts, each token of a step may be drawn after.
        num_tokens = limits.max_num_batched_tokens
        largest = StepSizes(limits.max_num_seqs, num_tokens, num_tokens)
        self._uplink = Uplink(Packet.num_words(largest) + NEW_BLOCKS_WORDS, device)
        self._packets = Packets()
        self._graphs: StepGraphs | None = None
        self._unread: PendingStep | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes on the device of what is kept of rows, and of the packets that speak of them."""
        return self._rows.num_bytes + self._uplink.device_memory.nbytes

    @torch.inference_mode()
    def compile_kernels(self, sizes: Iterable[StepSizes]) -> None:
        """Have the kernels of steps of these sizes compiled. On a GPU; no step is run."""
        from octavo.kernels.triton_launch import compile_ahead  # there is no Triton elsewhere

        memory, stages, limits = self._uplink.device_memory, self._stages, self._limits
        with compile_ahead(self._num_threads or 1):
            for size in sizes:
                packet = Packet.over(memory, size)
                inputs = stages.allocate_inputs(size, limits.max_model_len)
                for own in inputs.groups:  # nothing is prepared, and torch's own kernels do run
                    for ids in (own.token_ids, own.positions, own.slots):
                        ids.zero_()
                max_query_len = 1 if size.num_tokens == size.num_seqs else size.num_tokens
                bounds = StepBounds(max_query_len, limits.max_model_len)
                hidden = stages.run_model(packet.shares, packet.draws, inputs, bounds)
                for truncates in (False, True):
                    stages.draw(stages.logits(hidden), packet.draws, truncates=truncates)

    @torch.inference_mode()
    def capture_graphs(self, recorder: Callable[[], Recorder] = cuda_recorder) -> None:
        """Replay graphs from now on."""
        self._graphs = StepGraphs(
            self._stages,
            self._limits,
            self._packets,
            self._uplink.device_memory,
            record=recorder(),
        )
        self._graphs.capture_all()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; the result has a token for each share that `samples`."""
        return self.launch(plan).result()

    @memory_errors()
    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> "PendingStep":
        """Hand one step to the device. Its result may be read after the next one is launched.

        Raises:
            MemoryError: no memory is left to compute it in; a smaller step may be possible.
        """
        self._set_num_threads()
        new_blocks = self._rows.update(plan)
        failed, transfer_s = self._storage.transfer(plan.transfers)
        if self._images is not None:
            self._images.update(plan)
        rows = [self._rows[share.sequence_id] for share in plan.scheduled]
        draws, readings = self._run(plan, rows, new_blocks) if rows else (_nothing, _no_readings)
        for share, row in zip(plan.scheduled, rows, strict=True):
            row.num_computed_tokens += share.num_tokens
            row.num_tokens += share.samples and not share.draft_ids
        bare = StepResult(plan.step, (), failed, transfer_s)
        self._unread = PendingStep(bare, plan.scheduled, rows, draws, readings)
        return self._unread

    def _run(
        self, plan: StepPlan, rows: list[Row], new_blocks: NewBlocks
    ) -> tuple[Callable[[], Drawn], Callable[[], tuple[Reading, ...]]]:
        """Send a step down, run the model over it, draw and read; both can be asked for later."""
        step = lay_out(plan.scheduled, rows)
        if readers := self._rows.readers:
            reads = lay_out_reads(plan.scheduled, step.starts, step.query_starts, readers)
            step = replace(step, reads=reads)
        graphs, stages, sizes = self._graphs, self._stages, step.sizes
        images = None if self._images is None else self._images.among(step, rows)
        # A step that adds rows of images runs without a graph: it has a prompt's worth of tokens,
        # and can wait for its launches.
        shape = None if graphs is None or images is not None else graphs.shape_for(sizes)
        for told in self._told:
            told.send(step, rows, (shape or sizes).num_tokens)
        if graphs is not None and shape is not None:
            packet = self._send(step, partial(graphs.packet, shape=shape), new_blocks)
            hidden = graphs.run_model(shape)
        else:
            packet = self._send(step, partial(self._packets.over, sizes=sizes), new_blocks)
            inputs = stages.allocate_inputs(sizes, step.bounds.max_context_len)
            hidden = stages.run_model(
                packet.shares, packet.draws, inputs, step.bounds, images=images
            )
        readings = _no_readings
        if sizes.num_reads:
            num_at_once = self._limits.num_scored_at_once
            wanted = hidden[sizes.num_samples : sizes.num_wanted]
            readings = read(wanted, step.reads, logits=stages.logits, num_at_once=num_at_once)
        draws = self._draw(step, hidden, packet, in_graph=shape is not None)
        return draws, readings

    def _draw(
        self, step: StepLayout, hidden: Tensor, packet: Packet, *, in_graph: bool
    ) -> Callable[[], Drawn]:
        """Draw from the first of these hidden states; what came of it can be asked for later."""
        stages, num_samples = self._stages, len(step.draw_rows)
        if not num_samples:
            return Readback(None, stages.device).wait
        truncates = step.truncates(self._rows)
        is_plain = not any(row.wants_more_than_a_draw for row in step.draw_rows)
        if is_plain and in_graph and self._graphs is not None:
            token_ids = self._graphs.draw(num_samples, truncates=truncates)
            return Readback(token_ids, stages.device).wait
        hidden = hidden[:num_samples]
        draw = partial(stages.draw, draws=packet.draws.first(num_samples), truncates=truncates)
        if is_plain:
            return Readback(draw(stages.logits(hidden)), stages.device).wait
        logits = stages.logits(hidden)
        if self._unread is not None and any(row.shapes_logits for row in step.draw_rows):
            # Penalties and shapes want the ids drawn so far. The device has this step's pass to run
            # meanwhile.
            self._unread.result()
        drawn = sample(logits, step.draw_rows, draw)
        return lambda: drawn

    def _send(
        self, step: StepLayout, packet_over: Callable[[Tensor], Packet], new_blocks: NewBlocks
    ) -> Packet:
        """Copy a step to the device, with the new blocks behind it; return the packet there."""
        buffer, on_device = self._uplink.next_buffer(), self._uplink.device_memory
        packet = packet_over(buffer)
        step.write(packet, self._rows)
        places, block_ids = new_blocks
        first, second = len(packet.words), len(packet.words) + len(places)
        stop = second + len(block_ids)
        if stop <= len(buffer):
            buffer.numpy()[first:stop] = places + block_ids
            self._uplink.send(stop)
            if places:
                self._rows.apply(on_device[first:second], on_device[second:stop])
        else:
            self._uplink.send(first)
            columns = torch.tensor(new_blocks, dtype=torch.int32).to(on_device.device)
            self._rows.apply(*columns)
        return packet_over(on_device)

    def _set_num_threads(self) -> None:
        """OpenMP counts threads for each calling thread apart, and steps may come from another."""
        if self._num_threads is not None and self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            torch.set_num_threads(self._num_threads)


class PendingStep:
    """A step that the device has. `result` waits until it is done."""

    def __init__(
        self,
        bare: StepResult,
        shares: tuple[ScheduledTokens, ...],
        rows: list[Row],
        draws: Callable[[], Drawn],
        readings: Callable[[], tuple[Reading, ...]],
    ):
        self._bare = bare  # all but the tokens
        self._shares = shares
        self._rows = rows
        self._draws = draws
        self._readings = readings
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """What the step brought; its rows know their new tokens from then on."""
        if self._result is None:
            drawn, place, sampled = self._draws(), 0, []
            for share, row in zip(self._shares, self._rows, strict=True):
                if not share.samples:
                    continue
                token_id = drawn.token_ids[place]
                if share.draft_ids or drawn.logprobs is not None or token_id < 0:
                    stop = place + len(share.draft_ids) + 1
                    sampled.append(_take(share, row, drawn, slice(place, stop)))
                    place = stop
                else:  # as nearly always
                    row.token_ids.append(token_id)
                    sampled.append(SampledTokens(share.sequence_id, (token_id,)))
                    place += 1
            self._result = structs.replace(
                self._bare, sampled=tuple(sampled), readings=self._readings()
            )
        return self._result


def _nothing() -> Drawn:
    return Drawn([])


def _no_readings() -> tuple[Reading, ...]:
    return ()


def _take(share: ScheduledTokens, row: Row, drawn: Drawn, places: slice) -> SampledTokens:
    """A row's new tokens: each draft that is what was drawn in its place, and the draw after them.

    Draws depend on seed and position only, so the text is the same as without drafts.
    """
    token_ids, num_right = drawn.token_ids[places], 0
    for draft_id, token_id in zip(share.draft_ids, token_ids, strict=False):
        if token_id != draft_id:
            break
        num_right += 1
    token_ids = token_ids[: num_right + 1]
    # A failed row has no token; a step already planned may still run it on any id.
    row.token_ids += [max(token_id, 0) for token_id in token_ids]
    if share.draft_ids:
        row.num_tokens = len(row.token_ids)
        row.num_computed_tokens = row.num_tokens - 1
    if token_ids[-1] < 0:
        error = _NO_SUCH_ID if token_ids[-1] == NO_SUCH_ID else NOT_FINITE
        code = FailureCode.NUMERICAL_ERROR
        if row.matcher is not None and row.matcher.error:
            error, code = row.matcher.error, FailureCode.GENERATION_FAILED
        return SampledTokens(share.sequence_id, (), error=error, error_code=code)
    reports = [] if drawn.logprobs is None else drawn.logprobs[places][: len(token_ids)]
    logprobs = tuple(report for report in reports if report is not None)
    return SampledTokens(share.sequence_id, tuple(token_ids), logprobs or None)
