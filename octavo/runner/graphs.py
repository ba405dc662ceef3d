"""CUDA graphs of a step's stages: one launch from the host in place of hundreds.

A graph is made for sizes, and serves every step that is no larger: what a step lacks is filled up
with sequences and tokens of nobody. Knows neither plans nor requests.
"""

import bisect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.config import decode_sizes, mixed_sizes
from octavo.runner.packet import Packet, Packets, StepSizes
from octavo.runner.rows import StepLimits
from octavo.runner.stages import Stages, StepBounds


class Shape(NamedTuple):
    """What a graph of the model's pass is made for."""

    num_seqs: int
    num_tokens: int
    is_decode: bool  # one token a sequence, and each is drawn after


class Replay(Protocol):
    """Work that was recorded."""

    out: Tensor  # what the work returned; each run writes it anew

    def run(self) -> None: ...


Recorder = Callable[[Callable[[], Tensor]], Replay]


class CudaGraph:
    """Work on a GPU, recorded without being done. All graphs of a pool share its memory."""

    def __init__(self, work: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream):
        self._graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it collects garbage and empties caches first, 80 ms each time.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Relaxed: kernels may have to be loaded meanwhile.
            self._graph.capture_begin(pool, capture_error_mode="relaxed")
            try:
                self.out = work()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def run(self) -> None:
        self._graph.replay()


def cuda_recorder() -> Recorder:
    """Makes CUDA graphs in one new pool, on one stream: cuBLAS keeps a workspace for each."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return partial(CudaGraph, pool=torch.cuda.graph_pool_handle(), stream=stream)


class StepGraphs:
    """Graphs by shape, in one pool of memory.

    They share static memory: the packet that the uplink fills, the prepared inputs, the hidden
    states to draw from. Only one step may use it at a time, which the order of the stream ensures.
    """

    def __init__(
        self,
        stages: Stages,
        limits: StepLimits,
        packets: Packets,
        device_memory: Tensor,
        *,
        record: Recorder,
    ):
        self._record = record
        self._stages = stages
        self._limits = limits
        self._device_memory = device_memory  # [words] int32: where packets arrive
        num_seqs, num_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        self._inputs = stages.allocate_inputs(
            StepSizes(num_seqs, num_tokens, num_seqs), limits.max_model_len
        )
        self._decodes = decode_sizes(limits.max_num_seqs)
        self._mixed = mixed_sizes(limits.max_num_batched_tokens)
        self._packets = packets
        self._models: dict[Shape, Replay] = {}
        self._draws: dict[tuple[int, bool], Replay] = {}
        self._hidden = self._warm_up()  # [max_num_seqs, hidden_size]

    def shape_for(self, sizes: StepSizes) -> Shape | None:
        """The smallest shape that a step fits in, or None."""
        limits = self._limits
        if max(sizes.num_seqs, sizes.num_wanted) > limits.max_num_seqs:
            return None
        if sizes.num_tokens == sizes.num_seqs == sizes.num_samples:
            size = _at_least(self._decodes, sizes.num_seqs)
            return Shape(size, size, is_decode=True)
        if sizes.num_tokens > limits.max_num_batched_tokens:
            return None
        num_tokens = _at_least(self._mixed, sizes.num_tokens)
        return Shape(limits.max_num_seqs, num_tokens, is_decode=False)

    def packet(self, memory: Tensor, shape: Shape) -> Packet:
        """A packet as graphs of this shape read it, over memory of the host or the device."""
        sizes = StepSizes(shape.num_seqs, shape.num_tokens, self._limits.max_num_seqs)
        return self._packets.over(memory, sizes)

    def capture_all(self) -> None:
        """Make all graphs but those of truncated draws, so that no request waits for one.

        The largest comes first: it sizes the pool.
        """
        for num_tokens in reversed(self._mixed):
            self._model_graph(Shape(self._limits.max_num_seqs, num_tokens, is_decode=False))
        for size in reversed(self._decodes):
            self._model_graph(Shape(size, size, is_decode=True))
            self._draw_graph(size, truncates=False)

    def run_model(self, shape: Shape) -> Tensor:
        """Replay the model's pass -> hidden states to draw from, [num_seqs, hidden_size].

        They are valid until it runs again.
        """
        replay = self._model_graph(shape)
        replay.run()
        return replay.out

    def draw(self, num_samples: int, *, truncates: bool) -> Tensor:
        """Replay logits and draw -> ids [num_samples]; valid until the next draw."""
        replay = self._draw_graph(_at_least(self._decodes, num_samples), truncates=truncates)
        replay.run()
        return replay.out[:num_samples]

    def _warm_up(self) -> Tensor:
        """Run both kinds of steps on nobody, so that kernels are compiled; return hidden states."""
        num_seqs, num_tokens = self._limits.max_num_seqs, self._mixed[0]
        for shape in (Shape(1, 1, is_decode=True), Shape(num_seqs, num_tokens, is_decode=False)):
            draws = self.packet(self._device_memory, shape).draws.first(shape.num_seqs)
            hidden = self._model_pass(shape)
            self._stages.draw(self._stages.logits(hidden), draws, truncates=False)
        return hidden

    def _model_pass(self, shape: Shape) -> Tensor:
        num_seqs, num_tokens, is_decode = shape
        inputs = self._inputs.first(num_seqs, num_tokens)
        bounds = StepBounds(1 if is_decode else num_tokens, self._limits.max_model_len)
        packet = self.packet(self._device_memory, shape)
        draws = packet.draws.first(num_seqs)
        return self._stages.run_model(packet.shares, draws, inputs, bounds)

    def _model_graph(self, shape: Shape) -> Replay:
        if shape not in self._models:
            hidden = self._hidden[: shape.num_seqs]
            self._models[shape] = self._record(lambda: hidden.copy_(self._model_pass(shape)))
        return self._models[shape]

    def _draw_graph(self, num_samples: int, *, truncates: bool) -> Replay:
        key = num_samples, truncates
        if key not in self._draws:
            any_shape = Shape(1, 1, is_decode=True)  # draws lie in the same place in all of them
            packet = self.packet(self._device_memory, any_shape)
            draws, hidden = packet.draws.first(num_samples), self._hidden[:num_samples]

            def run() -> Tensor:
                return self._stages.draw(self._stages.logits(hidden), draws, truncates=truncates)

            self._draws[key] = self._record(run)
        return self._draws[key]


def _at_least(sizes: list[int], number: int) -> int:
    return sizes[bisect.bisect_left(sizes, number)]
