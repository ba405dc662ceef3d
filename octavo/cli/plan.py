"""`octavo plan`: where the memory would go and what would fit, from the config alone."""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.cli.flags import add_engine_flags, engine_values
from octavo.config import EngineOptions, ResolvedConfig, locate, read_model_config, resolve
from octavo.config.capacity import LengthClass, MixCapacity, mix_capacity, parse_lengths
from octavo.config.memory_plan import MemoryPlan, plan_memory
from octavo.config.planned_devices import KNOWN_GPUS, device_budget, planned_device
from octavo.config.planned_steps import largest_step
from octavo.errors import ConfigError

HELP = "plan memory and capacity from a model's config, before anything is loaded"

MIB = 2**20
BAR_WIDTH = 30
LENGTHS = (512, 2048, 8192, 32768, 131072)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One part of the device's memory."""

    group: str
    name: str
    num_bytes: int
    reason: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--device-memory-gib",
        type=float,
        metavar="GIB",
        help="memory of the device, in place of what is known of it",
    )
    group.add_argument(
        "--lengths",
        metavar="MIX",
        help="how many sequences of a mix fit: TOKENS:SHARE,... or PROMPT+OUTPUT:SHARE,...",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the plan as a picture")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    group.add_argument(
        "--check",
        action="store_true",
        help="load the model here, run the largest step and compare what it took",
    )
    add_engine_flags(parser)
    # The engine's flag knows only devices that are here.
    device = next(action for action in parser._actions if action.dest == "device")
    device.choices, device.metavar = None, "NAME"
    device.help = (
        "auto, cpu or cuda of this machine, cpu-64gib and the like, or one that need not be here: "
        f"{', '.join(KNOWN_GPUS)} (default: auto)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; the status is 1 where it does not fit, or does not hold."""
    mix = parse_lengths(arguments.lengths) if arguments.lengths else ()
    values = engine_values(arguments)
    name = values.pop("device", "auto")
    here = name in ("auto", "cpu", "cuda") and arguments.device_memory_gib is None
    if arguments.check and not here:
        raise ConfigError("--check runs the model, so it needs a device of this machine")
    facts, major = planned_device(name, arguments.device_memory_gib)
    options = EngineOptions.from_flat(arguments.model, values)
    checkpoint = locate(options.model, weights=arguments.check)
    model_config = read_model_config(checkpoint, options.loading.model_impl)
    config = resolve(options, model_config, facts)
    budget = device_budget(facts, major=major, utilization=config.gpu_memory_utilization)
    plan = plan_memory(config, budget)
    print(f"{checkpoint.name} on {budget.name}, {config.dtype}, before anything is loaded\n")
    print(as_text(plan, config))
    capacity = None
    if mix and not plan.missing_bytes:
        capacity = _mix_capacity(plan, mix)
        print("\n" + mix_text(mix, capacity))
    if arguments.json is not None:
        found = as_json(plan, capacity) | {"model": checkpoint.name, "dtype": config.dtype}
        _write(arguments.json, json.dumps(found, indent=2) + "\n")
    if arguments.plot is not None:
        from octavo.cli.plan_picture import draw_plan

        draw_plan(segments(plan), f"{checkpoint.name} on {budget.name}", arguments.plot)
    if arguments.check:
        return _check(options, name, on_cpu=config.device == "cpu")
    return 1 if plan.missing_bytes else 0


def segments(plan: MemoryPlan) -> list[Segment]:
    """The device's memory, cut into parts that sum to the whole where the plan fits."""
    parts = []
    if plan.budget.others_bytes:
        on_gpu = plan.budget.workspace_bytes > 0
        reason = "CUDA context, loaded kernels, other processes" if on_gpu else "in use now"
        parts.append(Segment("others", "others", plan.budget.others_bytes, reason))
    for group in plan.weights:
        count = f"{group.num_parameters:,} numbers, " if group.num_parameters else ""
        parts.append(Segment("weights", group.kind, group.num_bytes, count + group.layout))
    peak = plan.peak
    reason = f"the largest step at its peak: {peak.name}"
    parts.append(Segment("activations", "activations", peak.num_bytes, reason))
    if plan.budget.workspace_bytes:
        reason = "taken at the first matrix product"
        workspace = Segment("activations", "cuBLAS workspace", plan.budget.workspace_bytes, reason)
        parts.append(workspace)
    if plan.graph_bytes:
        reason = "at most: the largest step's memory, shared by all"
        parts.append(Segment("activations", "CUDA graphs", plan.graph_bytes, reason))
    reason = "block tables, and the way to them"
    parts.append(Segment("rows", "rows", plan.row_bytes, reason))
    reason = f"{plan.num_blocks:,} blocks of {plan.block_size} tokens"
    parts.append(Segment("KV cache", "KV cache", max(plan.kv_cache_bytes, 0), reason))
    parts.append(Segment("not used", "not used", max(plan.unused_bytes, 0), "left to spare"))
    return parts


def as_text(plan: MemoryPlan, config: ResolvedConfig) -> str:
    """The table, where its numbers come from, and what fits."""
    parts = segments(plan)
    rows = [
        (part.name, part.num_bytes, part.reason, "  " if part.group == "weights" else "")
        for part in parts
    ]
    first = next(i for i, part in enumerate(parts) if part.group == "weights")
    summary = f"{plan.num_parameters:,} parameters"
    rows.insert(first, ("weights", plan.weight_bytes, summary, ""))
    rows.append(("device", plan.budget.total_bytes, plan.budget.name, ""))
    width = max(len(indent + name) for name, _, _, indent in rows)
    lines = []
    for name, num_bytes, reason, indent in rows:
        share = num_bytes / plan.budget.total_bytes
        bar = "█" * round(share * BAR_WIDTH) if not indent and name != "device" else ""
        columns = f"{indent + name:{width}}  {num_bytes / MIB:10,.1f} MiB  {share:6.1%}"
        lines.append(f"{columns}  {bar:{BAR_WIDTH}}  {reason}")
    texts = ["\n".join(lines), _kv_text(plan), _step_text(plan, config), _fits_text(plan)]
    if config.model.is_bridged:
        texts.append("transformers' modules run this model: weights and steps are estimates")
    return "\n\n".join(texts)


def _kv_text(plan: MemoryPlan) -> str:
    lines = [f"KV of a token: {plan.kv_bytes_per_token:,} bytes"]
    lines += [
        f"  {layers.kind}: {layers.num_layers} layers of {layers.bytes_per_token_and_layer:,} bytes"
        for layers in plan.kv_layers
    ]
    if not plan.kv_groups.keep_all:
        windows = Counter(plan.kv_groups.windows)
        kinds = (
            f"{count} with whole contexts"
            if window is None
            else f"{count} in a window of {window:,}"
            for window, count in windows.items()
        )
        lines.append(
            f"  in {sum(windows.values())} groups ({', '.join(kinds)}), which share blocks of "
            f"{plan.kv_block_bytes:,} bytes; what a window leaves behind is given back"
        )
    return "\n".join(lines)


def _step_text(plan: MemoryPlan, config: ResolvedConfig) -> str:
    num_tokens, num_seqs = largest_step(config)
    lines = [
        f"largest step: {num_tokens:,} tokens of {num_seqs:,} sequences, "
        f"{_purpose(config)}; its peak is at: {plan.peak.name}"
    ]
    for tensor in plan.peak.tensors:
        shape = " x ".join(f"{size:,}" for size in tensor.shape)
        lines.append(f"  {tensor.num_bytes / MIB:10,.1f} MiB  {tensor.name} [{shape}]")
    return "\n".join(lines)


def _purpose(config: ResolvedConfig) -> str:
    """What the sequences of the largest step are for."""
    return "which become a vector each" if config.model.is_encoder else "which all draw a token"


def _fits_text(plan: MemoryPlan) -> str:
    if plan.missing_bytes:
        return (
            f"DOES NOT FIT: {plan.missing_bytes / MIB:,.1f} MiB are missing; take a larger device, "
            "or lower max_num_batched_tokens, max_num_seqs or kv_cache_memory_bytes"
        )
    context = plan.largest_context
    if not plan.kv_bytes_per_token:
        return (
            f"what fits: prompts of {context:,} tokens, bound by max_model_len; nothing of them is "
            "kept"
        )
    bound = "max_model_len" if context == plan.max_model_len else "the KV cache"
    lines = [
        f"what fits in {plan.num_kv_tokens:,} tokens of KV cache",
        f"  largest context of one sequence: {context:,} tokens, bound by {bound}",
    ]
    lengths = [length for length in LENGTHS if length < context] + [context]
    for length in lengths if context else ():
        count = plan.pool.num_sequences(length)
        running = min(count, plan.max_num_seqs)
        bound = f", of which max_num_seqs runs {running:,}" if running < count else ""
        lines.append(f"  sequences of {length:>9,} tokens: {count:>9,}{bound}")
    return "\n".join(lines)


def _mix_capacity(plan: MemoryPlan, mix: Sequence[LengthClass]) -> MixCapacity:
    if not plan.kv_bytes_per_token:
        raise ConfigError("--lengths shares a KV cache out, and an encoder has none; leave it out")
    longest = max(one.num_tokens for one in mix)
    if longest > plan.largest_context:
        raise ConfigError(
            f"--lengths has sequences of {longest:,} tokens, but the largest context is "
            f"{plan.largest_context:,}"
        )
    return mix_capacity(mix, plan.pool, max_num_seqs=plan.max_num_seqs)


def mix_text(mix: Sequence[LengthClass], capacity: MixCapacity) -> str:
    """How many sequences of a mix run at once."""
    classes = ", ".join(f"{one.share:.0%} of {one.num_tokens:,}" for one in mix)
    lines = [
        f"mix of lengths: {classes} tokens",
        f"  all at their full length: {capacity.num_at_ends:,} at once "
        f"({capacity.blocks_at_ends:,.1f} blocks each)",
    ]
    if capacity.num_on_average is not None:
        lines.append(
            f"  at a random moment:       {capacity.num_on_average:,} at once "
            f"({capacity.blocks_on_average:,.1f} blocks each); beyond the line above, "
            "preemption becomes possible"
        )
    return "\n".join(lines)


def as_json(plan: MemoryPlan, capacity: MixCapacity | None) -> dict[str, Any]:
    """The plan and what follows from it."""
    derived = (
        "num_parameters",
        "weight_bytes",
        "activation_bytes",
        "graph_bytes",
        "kv_bytes_per_token",
        "num_blocks",
        "num_kv_tokens",
        "largest_context",
        "unused_bytes",
        "missing_bytes",
    )
    found = dataclasses.asdict(plan) | {name: getattr(plan, name) for name in derived}
    found["peak"] = plan.peak.name
    if plan.largest_context and plan.kv_bytes_per_token:
        found["num_sequences_at_largest_context"] = plan.pool.num_sequences(plan.largest_context)
    if capacity is not None:
        found["mix"] = dataclasses.asdict(capacity)
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _check(options: EngineOptions, device: str, *, on_cpu: bool) -> int:
    from octavo.engine import build_engine  # imports torch
    from octavo.engine.memory_report import TOLERANCE, measure_largest_step, with_activations

    options = dataclasses.replace(
        options, device=dataclasses.replace(options.device, device=device)
    )
    if on_cpu:  # where only steps in this thread can be measured; they take the same memory
        here = dataclasses.replace(options.scheduler, async_scheduling=False)
        options = dataclasses.replace(options, scheduler=here)
    engine = build_engine(options)
    report = engine.memory
    if any(line.measured_bytes is None for line in report.lines):
        # A GPU that sized its KV cache has run this step already.
        report = with_activations(report, measure_largest_step(engine.core, engine.config))
    print(f"\n{'':14}{'planned':>14}{'measured':>14}{'error':>9}")
    for line in (*report.lines, report.total):
        measured = line.measured_bytes or 0
        sizes = f"{line.planned_bytes / MIB:10,.1f} MiB{measured / MIB:10,.1f} MiB"
        print(f"{line.what:14}{sizes}{line.error or 0:+9.2%}")
    return 1 if report.largest_error > TOLERANCE else 0
