"""A LoRA adapter as PEFT saves it: a directory with `adapter_config.json` and safetensors.

Reads and judges the config; refuses by name what would change the arithmetic and is not done here.
Knows no torch.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from octavo.config.checkpoint import excerpt
from octavo.config.lora import MAX_RANK
from octavo.config.reading import Reader
from octavo.errors import CheckpointError, UnsupportedModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20

# What must be as it is by default, and what that is.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "megatron_config": (None,),
}
# How A and B began where the weights beside them were changed, too; others leave no trace.
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter's config says of its arithmetic."""

    rank: int
    scale: float  # what B A x is multiplied by


def read_adapter_config(directory: Path, *, max_rank: int) -> AdapterConfig:
    """The config of an adapter, checked.

    Args:
        directory: with the adapter's files.
        max_rank: the largest rank that there is room for.

    Raises:
        CheckpointError: it is missing or damaged.
        UnsupportedModelError: it asks for what is not done here.
    """
    path = directory / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{CONFIG} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{CONFIG} is no JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{CONFIG} holds no JSON object")
    read = Reader(values, where=CONFIG)
    if (kind := read.raw("peft_type")) != "LORA":
        raise read.unsupported("peft_type", kind, "only 'LORA'")
    for name, neutral in NEUTRAL.items():
        if (value := read.raw(name)) not in neutral:
            raise read.unsupported(name, value, f"only {neutral[0]!r}")
    began = read.raw("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(CHANGES_WEIGHTS):
        raise read.unsupported(
            "init_lora_weights",
            began,
            "for it changed the base weights; PEFT converts such an "
            "adapter on saving: path_initial_model_for_weight_conversion",
        )
    rank = read.integer("r", 1, MAX_RANK)
    if rank > max_rank:
        raise read.unsupported("r", rank, f"at most {max_rank}; raise max_lora_rank")
    alpha = read.number("lora_alpha", 0.0, 1e6)
    over = math.sqrt(rank) if read.boolean("use_rslora", False) else rank
    return AdapterConfig(rank, alpha / over)


def digest_of(directory: Path) -> str:
    """The SHA-256 of an adapter's files, in hex: equal only where the contents are.

    Raises:
        CheckpointError: a file cannot be read.
    """
    whole = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with (directory / name).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    return whole.hexdigest()


def module_of(tensor: str) -> tuple[str, str]:
    """(the module that a tensor is for, "A" or "B").

    Raises:
        UnsupportedModelError: it is neither.
    """
    for letter in ("A", "B"):
        module = tensor.removesuffix(f".lora_{letter}.weight")
        if module != tensor:
            return module.removeprefix("base_model.model."), letter
    raise UnsupportedModelError(
        f"{WEIGHTS}: tensor {excerpt(repr(tensor))} is not supported: only lora_A.weight and "
        "lora_B.weight"
    )
