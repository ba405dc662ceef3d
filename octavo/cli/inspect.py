"""`octavo inspect`: what a model is, from its small files and the heads of its large ones.

Also of models that are not supported: why, what of their config nobody reads, which of our families
is nearest, and whether transformers' modules would run them.
"""

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from octavo.cli.explain import NUMBER, ranges
from octavo.config import ALIASES, Checkpoint, LayerConfig, ModelConfig, MoEConfig, locate
from octavo.config.architectures import broken_plugins
from octavo.config.inspection import Inspection, Reading, inspect_config, weight_groups
from octavo.config.stored_tensors import StoredTensor, stored_tensors
from octavo.errors import ConfigError, OctavoError
from octavo.text import load_tokenizer

HELP = "print what a model is made of, and what of it is not supported and why"

MIB = 2**20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an alias, a Hugging Face directory, a .gguf file or a hub id "
        f"(aliases: {', '.join(ALIASES)}); of a directory, config.json is enough",
    )
    parser.add_argument(
        "--tensors", action="store_true", help="every tensor, not one line for those that are alike"
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="hold the tensors to those that our model of it, or the nearest one, waits for",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what there is to say; the status is 1 where our own layers would refuse the model."""
    checkpoint = locate(arguments.model, weights=False)
    found = inspect_config(checkpoint)
    tensors, problems = stored_tensors(checkpoint)
    tokenizer = tokenizer_facts(checkpoint)
    fit = fit_problems(checkpoint, found.best, tensors) if arguments.fit else ()
    if arguments.json:
        facts = as_json(checkpoint, found, (tensors, problems), tokenizer)
        shown = json.dumps(facts | {"fit_problems": fit} if arguments.fit else facts, indent=2)
    else:
        parts = [
            _who_text(checkpoint, found),
            _shape_text(found.best),
            _tensor_text(tensors, problems, each=arguments.tensors),
            "\n".join(fit or ["each tensor has its place"]) if arguments.fit else "",
            _facts_text("tokenizer", tokenizer),
            _facts_text("generation config", checkpoint.generation_config()),
            _facts_text("quantization", _quantization(checkpoint)),
            _refusal_text(found),
        ]
        shown = printable("\n\n".join(part for part in parts if part))
    with contextlib.suppress(BrokenPipeError):  # `octavo inspect MODEL --tensors | head`
        print(shown)
    return 1 if found.problems or fit else 0


def printable(text: str) -> str:
    """A stranger's names may hold what a terminal obeys; here it is spelled out."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def fit_problems(
    checkpoint: Checkpoint, reading: Reading | None, tensors: Sequence[StoredTensor]
) -> list[str]:
    """What keeps these tensors from being loaded, one line for those that are alike."""
    if checkpoint.kind == "gguf" or not tensors:
        raise ConfigError("--fit holds safetensors to a model, and there are none")
    if reading is None or reading.config is None:
        raise ConfigError("--fit needs a config that one of our architectures can read")
    from octavo.weights.fitting import misfits  # imports torch

    found = misfits(reading.config, {one.name: one.shape for one in tensors})
    name = reading.architecture.name
    sides = (
        (f"{name} waits for", found.missing),
        (f"{name} has no place for", found.unexpected),
    )
    lines = [
        f"{what} {pattern} {_shape(first.shape)}"
        for what, shapes in sides
        for pattern, _, first in tensor_patterns(
            [StoredTensor(key, shape, "", 0) for key, shape in shapes.items()]
        )
    ]
    for key, (stored, expected) in found.reshaped.items():
        lines.append(f"{key} is {_shape(stored)}, and {name} waits for {_shape(expected)}")
    return lines


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is to be known of the tokenizer and the chat template, or why they cannot be used."""
    try:
        tokenizer = load_tokenizer(checkpoint)
        template = checkpoint.chat_template()
    except OctavoError as error:
        return {"problem": str(error)}
    return {
        "tokens": tokenizer.vocab_size,
        "control tokens": len(tokenizer.special_token_ids),
        "beginning of sequence": tokenizer.bos_token_id,
        "ends of sequence": list(tokenizer.eos_token_ids),
        "chat template": None if template is None else f"{len(template):,} characters",
        "template knows tools": template is not None and "tools" in template,
    }


def layer_kinds(config: ModelConfig) -> list[tuple[str, str, str]]:
    """(numbers of layers, their attention, their feed-forward block), one for each kind."""
    return [
        (
            ranges([index for index, layer in enumerate(config.layers) if layer == kind]),
            _attention(kind),
            _feed_forward(kind),
        )
        for kind in config.kinds_of_layers
    ]


def tensor_patterns(tensors: Sequence[StoredTensor]) -> list[tuple[str, int, StoredTensor]]:
    """(name with ranges of numbers, how many, the first of them), of tensors that are alike."""
    groups: dict[tuple[str, tuple[int, ...], str], list[StoredTensor]] = {}
    for tensor in tensors:
        key = (NUMBER.sub("{}", tensor.name), tensor.shape, tensor.dtype)
        groups.setdefault(key, []).append(tensor)
    found = []
    for (pattern, _, _), alike in groups.items():
        numbers = zip(*(map(int, NUMBER.findall(one.name)) for one in alike), strict=True)
        shown = (ranges(sorted(set(places))) for places in numbers)
        name = re.sub(r"\{\}", lambda _, shown=shown: next(shown), pattern)  # type: ignore[misc]
        found.append((name, len(alike), alike[0]))
    return found


def as_json(
    checkpoint: Checkpoint,
    found: Inspection,
    stored: tuple[tuple[StoredTensor, ...], tuple[str, ...]],
    tokenizer: dict[str, Any],
) -> dict[str, Any]:
    """All of it, in plain types."""
    best, config = found.best, found.best and found.best.config
    return {
        "name": checkpoint.name,
        "kind": checkpoint.kind,
        "class": found.hf_name,
        "model_type": found.model_type,
        "architecture": found.ours and found.ours.architecture.name,
        "package": found.ours and found.ours.architecture.package,
        "is_supported": not found.problems,
        "problems": list(found.problems),
        "transformers_problems": list(found.bridge_problems),
        "nearest": found.nearest and found.nearest.architecture.name,
        "nearest_problems": list(found.nearest.refused) if found.nearest else [],
        "unread": list(best.unread) if best else [],
        "config": config and dataclasses.asdict(config),
        "weights": [dataclasses.asdict(group) for group in weight_groups(config)] if config else [],
        "tensors": [dataclasses.asdict(tensor) for tensor in stored[0]],
        "tensor_problems": list(stored[1]),
        "tokenizer": tokenizer,
        "generation_config": checkpoint.generation_config(),
        "quantization": _quantization(checkpoint),
        "broken_packages": list(broken_plugins()),
    }


def _who_text(checkpoint: Checkpoint, found: Inspection) -> str:
    model_type = f" (model_type {found.model_type})" if found.model_type else ""
    lines = [f"{checkpoint.name}: {found.hf_name}{model_type}, from {_KINDS[checkpoint.kind]}"]
    if not found.problems and found.ours is not None:
        architecture = found.ours.architecture
        lines.append(f"run by {architecture.model} of the package {architecture.package}")
    elif not found.bridge_problems:
        lines.append("NOT SUPPORTED by Octavo's own layers; transformers' modules may run it")
    else:
        lines.append("NOT SUPPORTED")
    return "\n".join(lines)


_KINDS = {"directory": "a directory with safetensors", "gguf": "a GGUF file"}


def _shape_text(reading: Reading | None) -> str:
    if reading is None or reading.config is None:
        return ""
    config = reading.config
    groups = weight_groups(config)
    count = sum(group.num_parameters for group in groups)
    tied = "one matrix at both ends" if config.tie_word_embeddings else "a head of its own"
    lines = [
        f"{count:,} parameters, {sum(g.num_bytes for g in groups) / MIB:,.1f} MiB in memory as "
        f"{config.dtype}; {config.num_layers} layers, hidden size {config.hidden_size:,}, "
        f"vocabulary {config.vocab_size:,} ({tied})",
        f"contexts of at most {config.max_position_embeddings:,} tokens; "
        f"{config.num_cached_values:,} numbers in the KV cache for each; "
        f"{config.norm} norms, eps {config.norm_eps:g}",
    ]
    for group in groups:
        lines.append(f"  {group.num_bytes / MIB:10,.1f} MiB  {group.kind}")
    for numbers, attention, feed_forward in layer_kinds(config):
        lines.append(f"layers {numbers}")
        lines += [f"  attention: {attention}", f"  feed-forward: {feed_forward}"]
    if reading.refused:
        lines.insert(0, f"as {reading.architecture.name} would read it, but for what it refuses:")
    return "\n".join(lines)


def _attention(layer: LayerConfig) -> str:
    attention, rope = layer.attention, layer.attention.rope
    parts = [
        f"{attention.num_heads} heads over {attention.num_kv_heads} of keys and values, "
        f"{attention.head_dim} numbers each, scale {attention.scale:.6g}",
        "no rotation" if rope is None else f"rope {rope.theta:g} over {rope.rotary_dim} numbers",
    ]
    if rope and rope.scaling:
        parts[-1] += f", {rope.scaling.kind} x{rope.scaling.factor:g}"
    if attention.window is not None:
        parts.append(f"window {attention.window:,}")
    if attention.logit_softcap is not None:
        parts.append(f"softcap {attention.logit_softcap:g}")
    named = {"bias": attention.bias, "output bias": attention.output_bias}
    named |= {"QK-norm": attention.qk_norm, "beside the feed-forward block": layer.parallel}
    return "; ".join([*parts, *(name for name, has in named.items() if has)])


def _feed_forward(layer: LayerConfig) -> str:
    mlp = layer.mlp
    if isinstance(mlp, MoEConfig):
        shared = f", a shared one of {mlp.shared.intermediate_size:,}" if mlp.shared else ""
        return (
            f"{mlp.num_experts} experts of {mlp.intermediate_size:,}, "
            f"{mlp.num_experts_per_token} for each token{shared}"
        )
    gated = "gated " if mlp.gated else ""
    return f"{gated}{mlp.activation} of {mlp.intermediate_size:,}{', bias' if mlp.bias else ''}"


def _tensor_text(tensors: Sequence[StoredTensor], problems: Sequence[str], *, each: bool) -> str:
    lines = [f"tensors: {problem}" for problem in problems]
    if tensors:
        count = sum(tensor.num_parameters for tensor in tensors)
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        lines.append(f"{len(tensors):,} tensors, {count:,} numbers, {num_bytes / MIB:,.1f} MiB")
    rows = [(one.name, 1, one) for one in tensors] if each else tensor_patterns(tensors)
    for name, times, first in rows:
        copies = f"{times:,} x " if times > 1 else ""
        size = f"{times * first.num_bytes / MIB:10,.3f} MiB"
        lines.append(f"  {size}  {name}  {copies}{_shape(first.shape)} {first.dtype}")
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{' x '.join(f'{size:,}' for size in shape)}]"


def _facts_text(title: str, facts: dict[str, Any]) -> str:
    lines = [
        f"  {name}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in facts.items()
    ]
    return "\n".join([f"{title}:", *lines]) if facts else ""


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    found = checkpoint.config().get("quantization_config")
    return found if isinstance(found, dict) else {}


def _refusal_text(found: Inspection) -> str:
    lines = [f"not supported: {problem}" for problem in found.problems]
    if found.problems and found.bridge_problems:
        lines += [f"nor by --model-impl transformers: {why}" for why in found.bridge_problems]
    elif found.problems:
        lines.append("--model-impl transformers takes its config: slower, with its own modules")
    if found.nearest is not None:
        name = found.nearest.architecture.name
        lines.append(f"nearest of ours: {name}; octavo new-model NAME --like {name} starts from it")
        lines += [f"  it refuses: {why}" for why in found.nearest.refused]
    if found.best is not None and found.best.config is not None and found.best.unread:
        lines.append(f"in its config, but not read: {', '.join(found.best.unread)}")
    lines += [f"installed, but broken: {why}" for why in broken_plugins()]
    return "\n".join(lines)
