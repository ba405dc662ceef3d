"""Holds the memory plan to what an engine really took.

Owns the measuring: torch's allocator on a GPU, storages that are alive on a CPU. The plan itself
is `octavo.config.memory_plan`'s, and this module changes nothing in an engine.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from octavo.config import DeviceFacts, ResolvedConfig
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.core import NO_TOKENS, FinishReason, PoolingParams, Request, SamplingParams
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError, EngineDeadError
from octavo.runner import ModelRunner, reachable_storages

logger = logging.getLogger(__name__)

MIB = 2**20
TOLERANCE = 0.05
MOST_TRIES = 3  # torch's profiler now and then returns without the events of so short a step


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line: what was planned and what was found, or None where nothing was measured."""

    what: str
    planned_bytes: int
    measured_bytes: int | None
    is_bound: bool = False  # planned is the most that it may be

    @property
    def error(self) -> float | None:
        """(planned - measured) / measured; of a bound that holds, 0."""
        if not self.measured_bytes:
            return None
        error = self.planned_bytes / self.measured_bytes - 1
        return min(error, 0.0) if self.is_bound else error

    def __str__(self) -> str:
        planned = f"{self.planned_bytes / MIB:.1f} MiB"
        if self.measured_bytes is None or self.error is None:
            return f"{self.what} {planned} planned"
        return f"{self.what} {planned} planned, {self.measured_bytes / MIB:.1f} measured"


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Planned against measured."""

    lines: tuple[Comparison, ...]

    @property
    def total(self) -> Comparison:
        """The sum over the lines that were measured."""
        measured = [line for line in self.lines if line.measured_bytes is not None]
        return Comparison(
            "total",
            sum(line.planned_bytes for line in measured),
            sum(line.measured_bytes or 0 for line in measured),
        )

    @property
    def largest_error(self) -> float:
        """Of all measured lines, without sign."""
        return max(abs(line.error or 0.0) for line in (*self.lines, self.total))

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.lines, self.total)))


class MemoryMeter:
    """Plans an engine's memory before it is built, and reads what it holds while it is.

    Sole writer: `build_engine`, which calls the methods in their order here.
    """

    def __init__(self, config: ResolvedConfig, facts: DeviceFacts):
        self._on_gpu = config.device == "cuda"
        self._is_estimate = config.model.is_bridged
        major = torch.cuda.get_device_capability()[0] if self._on_gpu else 0
        budget = device_budget(
            facts, major=major, utilization=config.gpu_memory_utilization, has_context=True
        )
        self.plan = plan_memory(config, budget)
        self._start = torch.cuda.memory_allocated() if self._on_gpu else 0
        self._host_kv_bytes = config.num_host_blocks * config.kv_block_bytes
        self._before_kv = 0
        self._weights = 0
        self._activations: int | None = None
        self._rows: int | None = None
        self._kv: int | None = None
        self._host_kv = 0
        self._free = 0

    def weights_are_laid_out(self, model: object) -> None:
        """The model is there and nothing else."""
        now = torch.cuda.memory_allocated() if self._on_gpu else reachable_bytes(model)
        self._weights = now - self._start
        self._before_kv = now

    def step_was_profiled(self) -> None:
        """A GPU ran the largest step since its peak was reset; the KV cache is still to come."""
        self._activations = torch.cuda.max_memory_allocated() - self._before_kv
        self._before_kv = torch.cuda.memory_allocated()

    def kv_is_allocated(self, runner: ModelRunner, *, host_kv_bytes: int = 0) -> None:
        """The runner is there, with its KV blocks; so many bytes of them lie on the host."""
        if self._on_gpu:
            now = torch.cuda.memory_allocated()
        else:
            now = reachable_bytes(runner) - host_kv_bytes
        self._host_kv = host_kv_bytes
        self._rows = runner.row_bytes
        self._kv = now - self._before_kv - self._rows
        self._free = torch.cuda.mem_get_info()[0] if self._on_gpu else 0

    @property
    def _step_bytes(self) -> int | None:
        """Of the step that was profiled, which had rows of its own beside its activations."""
        return None if self._activations is None else self._activations - (self._rows or 0)

    def report(self) -> MemoryReport:
        """Everything is allocated, CUDA graphs included: compare and log."""
        lines = [
            Comparison("weights", self.plan.weight_bytes, self._weights),
            Comparison("activations", self.plan.activation_bytes, self._step_bytes),
            Comparison("rows", self.plan.row_bytes, self._rows),
            Comparison("KV cache", self.plan.kv_pool_bytes, self._kv),
        ]
        if self.plan.graph_bytes:
            taken = self._free - torch.cuda.mem_get_info()[0]
            lines.append(Comparison("CUDA graphs", self.plan.graph_bytes, taken, is_bound=True))
        if self._host_kv_bytes:
            lines.append(Comparison("KV on the host", self._host_kv_bytes, self._host_kv))
        report = MemoryReport(tuple(lines))
        is_good = self._is_estimate or report.largest_error <= TOLERANCE
        level = logging.INFO if is_good else logging.WARNING
        logger.log(level, "memory%s: %s", ", estimated" if self._is_estimate else "", report)
        return report


def reachable_bytes(root: object) -> int:
    """Bytes of the tensor storages that `root` leads to, each counted once."""
    return sum(storage.nbytes() for storage in reachable_storages(root))


def with_activations(report: MemoryReport, measured_bytes: int) -> MemoryReport:
    """The report with a peak that was measured after the start."""
    lines = (
        Comparison(line.what, line.planned_bytes, measured_bytes)
        if line.what == "activations"
        else line
        for line in report.lines
    )
    return MemoryReport(tuple(lines))


def measure_largest_step(core: EngineCore, config: ResolvedConfig) -> int:
    """Run the step that the plan counts on an idle engine; return the peak of what it allocates.

    On a GPU it must be the engine's first step, or cuBLAS has its workspace already. On a CPU
    torch's profiler watches every allocation of this thread, which takes seconds.

    Raises:
        ConfigError: nothing can be measured, as this engine runs its steps in another thread.
        EngineDeadError: the step failed, or torch recorded none of its allocations.
    """
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run_largest_step(core, config)
        return torch.cuda.max_memory_allocated() - before
    if config.async_scheduling:
        raise ConfigError(
            "an engine that plans ahead on a CPU runs its steps in a thread of their own, where "
            "torch's profiler sees nothing: measure one without async_scheduling"
        )
    for _ in range(MOST_TRIES):
        if peak := _profiled_peak(core, config):
            return peak
        core.reset_prefix_cache()  # or the next try finds its prompts computed
    raise EngineDeadError(f"torch's profiler recorded no allocation in {MOST_TRIES} steps")


def _profiled_peak(core: EngineCore, config: ResolvedConfig) -> int:
    # Imported here because only this command needs it.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run_largest_step(core, config)
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative where memory is given back
        peak = max(peak, alive)
    return peak


def _run_largest_step(core: EngineCore, config: ResolvedConfig) -> None:
    for request in _largest_step(config):
        core.add(request)
    while core.has_work:
        for event in core.step():
            if event.finish_reason is FinishReason.ERROR:
                raise EngineDeadError(f"the largest step failed: {event.error}")


def _largest_step(config: ResolvedConfig) -> Iterator[Request]:
    """As many prompts as may run at once, all different, with all the tokens of a step."""
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    share, rest = divmod(config.max_num_batched_tokens, num_seqs)
    for i in range(num_seqs):
        length = min(share + (i < rest), config.max_model_len - 1)
        prompt = [(i + j) % config.model.vocab_size for j in range(length)]
        draw = Request(
            request_id=f"largest-step-{i}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=1, temperature=1.0),
            seed=0,
        )
        read = msgspec.structs.replace(draw, sampling=NO_TOKENS, pooling=PoolingParams())
        yield read if config.model.is_encoder else draw
